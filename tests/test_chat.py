"""The prompt format: whole prompts written out by hand, completions, and what is refused."""

from functools import partial
from pathlib import Path

import pytest

from dsv4 import chat
from dsv4.chat import DEFAULT_TEXTS, Completion, PromptTexts, ToolCall, encode_chat

B, E = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
U, A = "<｜User｜>", "<｜Assistant｜>"
TEXTS = PromptTexts("Hard!\n\n", "Call like this.\n{tool_schemas}\nThat is all.\n")
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"name": "sum", "description": "größer {x}", "parameters": {"type": "object"}}
SCHEMA = '{"name": "sum", "description": "größer {x}", "parameters": {"type": "object"}}'
BLOCK = (
    "<｜DSML｜tool_calls>\n"
    '<｜DSML｜invoke name="sum">\n'
    '<｜DSML｜parameter name="numbers" string="false">[1, 2.5, null]</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="unit" string="true">5 "é"\n</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n"
    '<｜DSML｜invoke name="now">\n\n</｜DSML｜invoke>\n'
    "</｜DSML｜tool_calls>"
)
CALLS = [ToolCall("sum", {"numbers": [1, 2.5, None], "unit": '5 "é"\n'}), ToolCall("now", {})]


def message(role: str, content: str | None, **fields: object) -> dict:
    return {"role": role, "content": content, **fields}


user, assistant, result = (partial(message, role) for role in ("user", "assistant", "tool"))


def write_encoding(directory: Path, source: str) -> None:
    (directory / "encoding").mkdir()
    (directory / "encoding" / "encoding_dsv4.py").write_text(source, encoding="utf-8")


CALLING = assistant(
    "Adding.",
    reasoning="Use the tool.",
    tool_calls=[
        {"id": "a", "name": "sum", "arguments": {"numbers": [1, 2.5, None], "unit": '5 "é"\n'}},
        {"id": "b", "type": "function", "function": {"name": "now", "arguments": "{}"}},
    ],
)
HISTORY = [SYSTEM, user("1?"), assistant("One.", reasoning="Hm."), user("2?")]


@pytest.mark.parametrize(
    ("thinking", "before", "after"),
    [("off", "", "</think>"), ("on", "", "<think>"), ("max", "Hard!\n\n", "<think>")],
)
def test_single_turn(thinking: str, before: str, after: str) -> None:
    prompt = encode_chat([user(" Hi\n")], thinking=thinking, texts=TEXTS)
    assert prompt == f"{B}{before}{U} Hi\n{A}{after}"
    prompt = encode_chat([SYSTEM, user("Hi")], thinking=thinking, texts=TEXTS)
    assert prompt == f"{B}{before}Be brief.{U}Hi{A}{after}"


def test_earlier_reasoning() -> None:
    dropped = f"{B}Be brief.{U}1?{A}</think>One.{E}{U}2?{A}"
    kept = f"{B}Be brief.{U}1?{A}<think>Hm.</think>One.{E}{U}2?{A}<think>"
    assert encode_chat(HISTORY) == dropped + "</think>"
    assert encode_chat(HISTORY, drop_reasoning=False) == dropped + "</think>"
    assert encode_chat(HISTORY, thinking="on") == dropped + "<think>"
    assert encode_chat(HISTORY, thinking="on", drop_reasoning=False) == kept
    silent = [user("1?"), assistant("One."), user("2?")]
    expected = f"{B}{U}1?{A}<think></think>One.{E}{U}2?{A}<think>"
    assert encode_chat(silent, thinking="on", drop_reasoning=False) == expected
    official = [SYSTEM, user("1?"), assistant("One.", reasoning_content="Hm."), user("2?")]
    assert encode_chat(official, thinking="on", drop_reasoning=False) == kept


@pytest.mark.parametrize("tool", [TOOL, {"type": "function", "function": TOOL}])
def test_tool_definitions(tool: dict) -> None:
    preamble = f"\n\nCall like this.\n{SCHEMA}\n{SCHEMA}\nThat is all.\n"
    prompt = encode_chat([SYSTEM, user("Hi")], tools=[tool, tool], texts=TEXTS)
    assert prompt == f"{B}Be brief.{preamble}{U}Hi{A}</think>"
    prompt = encode_chat([user("Hi")], thinking="max", tools=[tool, tool], texts=TEXTS)
    assert prompt == f"{B}Hard!\n\n{preamble}{U}Hi{A}<think>"
    assert encode_chat([user("Hi")], tools=[], texts=TEXTS) == f"{B}{U}Hi{A}</think>"


def test_calls_and_results() -> None:
    messages = [user("Add."), CALLING, result("3.5"), result("noon"), user("And?")]
    turns = f"Adding.\n\n{BLOCK}{E}{U}<tool_result>3.5</tool_result>\n\n"
    turns += f"<tool_result>noon</tool_result>\n\nAnd?{A}"
    assert encode_chat(messages) == f"{B}{U}Add.{A}</think>{turns}</think>"
    assert encode_chat(messages, thinking="on") == f"{B}{U}Add.{A}</think>{turns}<think>"
    with_tools = encode_chat(messages, thinking="on", tools=[TOOL], texts=TEXTS)
    head = f"{B}\n\nCall like this.\n{SCHEMA}\nThat is all.\n{U}Add.{A}"
    assert with_tools == f"{head}<think>Use the tool.</think>{turns}<think>"


def test_results_stand_in_the_order_of_their_calls() -> None:
    results = [result("noon", tool_call_id="b"), result("3.5", tool_call_id="a")]
    prompt = encode_chat([user("Add."), CALLING, *results])
    blocks = "<tool_result>3.5</tool_result>\n\n<tool_result>noon</tool_result>"
    assert prompt.endswith(f"{E}{U}{blocks}{A}</think>")


def test_adjacent_users_and_reminder() -> None:
    prompt = encode_chat([SYSTEM, message("latest_reminder", "Friday"), user("a"), user("b")])
    assert prompt == f"{B}Be brief.<｜latest_reminder｜>Friday{U}a\n\nb{A}</think>"


def test_default_texts() -> None:
    sentence = "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    assert encode_chat([user("Hi")], thinking="max").startswith(B + sentence)
    assert DEFAULT_TEXTS.effort_max.endswith("\n\n") and not DEFAULT_TEXTS.trained
    prompt = encode_chat([user("Hi")], tools=[TOOL])
    assert f"\n{SCHEMA}\n" in prompt and "{tool_schemas}" not in prompt
    for markup in ("<｜DSML｜tool_calls>", '<｜DSML｜parameter name="', 'string="true|false"'):
        assert markup in prompt


TEMPLATE = "Do <{dsml_token}x> {thinking_start_token}{thinking_end_token}:\n{tool_schemas}."
TOOLS_LINE = f"TOOLS_TEMPLATE: str = {TEMPLATE!r}\n"
EFFORT_LINE = "raise SystemExit\nREASONING_EFFORT_MAX = ('Think ' 'a lot.')\n"
LEVELS_LINE = "REASONING_EFFORT_PROMPTS = {'low': '', 'max': 'Think a lot.'}\nx: int\n"


@pytest.mark.parametrize("effort", [EFFORT_LINE, LEVELS_LINE])
def test_trained_texts(tmp_path: Path, effort: str) -> None:
    assert PromptTexts.from_checkpoint(tmp_path) is DEFAULT_TEXTS
    write_encoding(tmp_path, f"import os\na = os.sep + 'b'\n{effort}{TOOLS_LINE}")
    preamble = "Do <｜DSML｜x> <think></think>:\n{tool_schemas}."
    assert PromptTexts.from_checkpoint(tmp_path) == PromptTexts("Think a lot.", preamble, True)


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        (TOOLS_LINE, r"REASONING_EFFORT_MAX or .*: expected a string constant, found none"),
        (EFFORT_LINE + "TOOLS_TEMPLATE = 3", "TOOLS_TEMPLATE: .* found int"),
        (EFFORT_LINE + "TOOLS_TEMPLATE = '{other}'", "expected no fields but .* found 'other'"),
        (EFFORT_LINE + "TOOLS_TEMPLATE = 'none'", "expected the field {tool_schemas}, found none"),
        ("def", "expected Python source"),
    ],
)
def test_texts_that_are_not_there(tmp_path: Path, source: str, complaint: str) -> None:
    write_encoding(tmp_path, source)
    with pytest.raises(ValueError, match=f"encoding_dsv4.py: .*{complaint}"):
        PromptTexts.from_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("thinking", "text", "expected"),
    [
        ("off", f"Yes.{E}", Completion("Yes.", None, [])),
        ("off", "cut", Completion("cut", None, [])),
        ("on", f"Hm.</think>Yes.{E}ignored", Completion("Yes.", "Hm.", [])),
        ("max", "</think>", Completion("", "", [])),
        ("on", "cut in though", Completion("", "cut in though", [])),
        ("on", f"Hm.</think>Adding.\n\n{BLOCK}{E}", Completion("Adding.", "Hm.", CALLS)),
        ("off", f"\n\n{BLOCK}\n", Completion("", None, CALLS)),
        ("off", f"a\n\n\n{BLOCK}", Completion("a\n", None, CALLS)),
        ("on", f"\n\n{BLOCK}{E}", Completion("", f"\n\n{BLOCK}", [])),
    ],
)
def test_parse_completion(thinking: str, text: str, expected: Completion) -> None:
    assert chat.parse_completion(text, thinking=thinking) == expected


@pytest.mark.parametrize("cut", range(1, len(BLOCK)))
def test_cut_calls_stay_in_the_content(cut: int) -> None:
    text = "Adding.\n\n" + BLOCK[:-cut]
    assert chat.parse_completion(text, thinking="off") == Completion(text, None, [])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("[1, 2.5, null]", "[1, 2.5"),
        ("[1, 2.5, null]", "[" * 200_000),
        ('string="false"', 'string="maybe"'),
        ('name="unit"', 'name="numbers"'),
        ('<｜DSML｜invoke name="now">', "<｜DSML｜invoke>"),
        ("</｜DSML｜tool_calls>", "</｜DSML｜tool_calls> and so on"),
        (BLOCK, "<｜DSML｜tool_calls>\n</｜DSML｜tool_calls>"),
    ],
)
def test_malformed_calls_stay_in_the_content(old: str, new: str) -> None:
    text = BLOCK.replace(old, new)
    assert text != BLOCK
    assert chat.parse_completion(text, thinking="off") == Completion(text, None, [])


@pytest.mark.parametrize("content", ["", "x", "x\n", "\n\n", "<tool_result>", "｜DSML｜"])
@pytest.mark.parametrize("calls", [[], CALLS, [ToolCall("f", {"s": "", "t": "3", "u": ["<"]})]])
def test_round_trip(content: str, calls: list[ToolCall]) -> None:
    fields = [{"name": call.name, "arguments": call.arguments} for call in calls]
    turn = assistant(content, reasoning="Because.\n", tool_calls=fields)
    prompt = encode_chat([user("q"), turn, user("r")], thinking="on", drop_reasoning=False)
    written = prompt.split("<think>")[1].partition(E)[0]
    assert chat.parse_completion(written, thinking="on") == Completion(content, "Because.\n", calls)


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "empty list"),
        ("Hi", "messages: expected a list"),
        (["Hi"], r"messages\[0\]: expected an object, found str"),
        ([{"content": "Hi"}], r"messages\[0\]: field role is missing"),
        ([{"role": "developer", "content": "Hi"}], "role: expected one of .* found 'developer'"),
        ([{"role": ["user"], "content": "Hi"}], "role: expected one of"),
        ([{"role": "user"}], "content: expected a string, found nothing"),
        ([{"role": "user", "content": ["Hi"]}], "content: expected a string, found list"),
        ([SYSTEM], r"messages\[0\]: role: expected user or tool for the last, found system"),
        ([user("a"), assistant("b")], "found assistant"),
        ([user("a"), SYSTEM, user("b")], "expected system directly after the beginning"),
        ([assistant("b"), user("a")], "expected assistant directly after user or tool"),
        ([user("a"), result("3")], "expected tool directly after assistant or tool, found user"),
        ([user("a"), assistant("b"), result("3")], "an assistant message with tool_calls"),
        ([user("a"), CALLING, result("3", tool_call_id="c")], "one of .'a', 'b'., found 'c'"),
        ([{"role": "latest_reminder", "content": "x"}], "found latest_reminder"),
        ([user("a"), assistant("b", reasoning=3), user("c")], "reasoning: expected a string"),
        ([{**user("a"), "tool_calls": CALLING["tool_calls"]}], "expected for assistant only"),
        ([user("a"), assistant("b", tool_calls={"name": "f"}), user("c")], "expected a list"),
        ([user("a"), assistant("", tool_calls=[{"name": ""}]), user("c")], "name: expected"),
        ([user("a"), assistant("", tool_calls=[3]), user("c")], r"tool_calls\[0\]: expected an"),
    ],
)
def test_validation(messages: list, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        chat.validate_messages(messages)
    with pytest.raises(ValueError, match=complaint):
        encode_chat(messages)


@pytest.mark.parametrize("arguments", [None, 3, "[1]", "{", [("a", 1)]])
def test_arguments_must_be_an_object(arguments: object) -> None:
    turn = assistant(None, tool_calls=[{"name": "f", "arguments": arguments}])
    with pytest.raises(ValueError, match=r"messages\[1\]: tool_calls\[0\]: arguments: expected"):
        encode_chat([user("a"), turn, user("b")])


def test_other_errors() -> None:
    with pytest.raises(ValueError, match="thinking: expected one of off, on, max, found 'high'"):
        encode_chat([user("a")], thinking="high")
    with pytest.raises(ValueError, match="thinking: expected one of"):
        chat.parse_completion("a", thinking="none")
    with pytest.raises(ValueError, match=r"tools\[1\]: expected an object with a name"):
        encode_chat([user("a")], tools=[TOOL, {"description": "x"}])
    with pytest.raises(ValueError, match=r"tools\[0\]: expected a JSON value"):
        encode_chat([user("a")], tools=[{"name": "f", "parameters": {3j}}])
