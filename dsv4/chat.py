"""The DeepSeek-V4 prompt format: messages to one string, and a completion back to its parts.

Responsible for the markup (roles, reasoning, tool definitions, calls and results), for checking
messages, and for the two English texts of the format. Not responsible for token ids
(``tokenizer.py``). Special tokens inside a message's text are not escaped: the format has no way.
"""

import ast
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, get_args

from dsv4.tokenizer import BOS, EOS

Message = Mapping[str, Any]
Thinking = Literal["off", "on", "max"]

USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
REMINDER = "<｜latest_reminder｜>"
THINK = "<think>"
END_THINK = "</think>"
DSML = "｜DSML｜"
CALLS = f"<{DSML}tool_calls>"
END_CALLS = f"</{DSML}tool_calls>"
SCHEMAS_FIELD = "{tool_schemas}"

# Which roles may stand directly before each role; None is the beginning of the conversation.
_PREDECESSORS: dict[str, tuple[str | None, ...]] = {
    "system": (None,),
    "latest_reminder": (None, "system", "assistant"),
    "user": (None, "system", "latest_reminder", "assistant", "user", "tool"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}

_INVOKE = re.compile(rf'\s*<{DSML}invoke name="([^"]*)">')
_PARAMETER = re.compile(
    rf'\s*<{DSML}parameter name="([^"]*)" string="(true|false)">(.*?)</{DSML}parameter>', re.DOTALL
)
_END_INVOKE = re.compile(rf"\s*</{DSML}invoke>")
_END_CALLS = re.compile(rf"\s*{END_CALLS}\s*\Z")


@dataclass(frozen=True)
class ToolCall:
    """One call the model makes: the tool's ``name`` and its ``arguments`` by name."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Completion:
    """An assistant turn. ``reasoning`` is None if thinking was off."""

    content: str
    reasoning: str | None
    tool_calls: list[ToolCall]


@dataclass(frozen=True)
class PromptTexts:
    """The English texts of the format.

    ``effort_max`` stands before the system text when thinking is "max". ``tools_preamble`` says how
    to call tools; its field ``{tool_schemas}`` is replaced by one JSON schema a line. ``trained``
    says whether this is the wording the model was trained with.
    """

    effort_max: str
    tools_preamble: str
    trained: bool = False

    @classmethod
    def from_checkpoint(cls, directory: str | Path) -> "PromptTexts":
        """The trained wording, from the constants of ``directory/encoding/encoding_dsv4.py``.

        The file is parsed, never executed. Without it: ``DEFAULT_TEXTS``, whose ``trained`` is
        false. Raises ``ValueError`` if the file is there but does not hold the constants.
        """
        path = Path(directory) / "encoding" / "encoding_dsv4.py"
        if not path.is_file():
            return DEFAULT_TEXTS
        constants = _module_constants(path)
        effort = constants.get("REASONING_EFFORT_MAX")
        if effort is None:
            levels = constants.get("REASONING_EFFORT_PROMPTS")
            effort = levels.get("max") if isinstance(levels, dict) else None
        names = 'REASONING_EFFORT_MAX or REASONING_EFFORT_PROMPTS["max"]'
        effort = _string_constant(path, names, effort)
        template = _string_constant(path, "TOOLS_TEMPLATE", constants.get("TOOLS_TEMPLATE"))
        return cls(effort, _fill_template(path, template), trained=True)


DEFAULT_TEXTS = PromptTexts(
    effort_max=(
        "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
        "Think the task through slowly and in full: split it into parts, solve each one, try other "
        "approaches, and look for cases in which your solution fails.\n"
        "Write all of this down as you go, dead ends included, and check the result once more "
        "before you answer.\n\n"
    ),
    tools_preamble=f"""# Tools

To use the tools listed further down, finish your reply with one block of this form. It holds one \
`invoke` element for each call, and each of these one `parameter` element for each argument:

{CALLS}
<{DSML}invoke name="NAME_OF_TOOL">
<{DSML}parameter name="NAME_OF_ARGUMENT" string="true|false">VALUE</{DSML}parameter>
</{DSML}invoke>
{END_CALLS}

With string="true" the value is text, written without quotes or escapes. With string="false" it is \
JSON: a number, a boolean, null, an array or an object. Any reasoning belongs between {THINK} and \
{END_THINK} and comes before the block.

The tools, one JSON schema a line; no other names or arguments exist:

{SCHEMAS_FIELD}
""",
)


def _module_constants(path: Path) -> dict[str, Any]:
    """The literal values that ``path`` assigns to names at module level."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{path}: expected Python source, found: {error}") from error
    constants = {}
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        try:
            value = ast.literal_eval(node.value)
        except (TypeError, ValueError):
            continue  # an expression, such as a sum of other constants
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        constants |= {target.id: value for target in targets if isinstance(target, ast.Name)}
    return constants


def _string_constant(path: Path, name: str, value: object) -> str:
    if not isinstance(value, str):
        found = "none" if value is None else type(value).__name__
        raise ValueError(f"{path}: {name}: expected a string constant, found {found}")
    return value


def _fill_template(path: Path, template: str) -> str:
    """The template with its markup fields filled and the field for the schemas left in."""
    fields = {"dsml_token": DSML, "thinking_start_token": THINK, "thinking_end_token": END_THINK}
    try:
        text = template.format(tool_schemas=SCHEMAS_FIELD, **fields)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        expected = f"no fields but {', '.join(fields)}, tool_schemas"
        raise ValueError(f"{path}: TOOLS_TEMPLATE: expected {expected}, found {error}") from error
    if SCHEMAS_FIELD not in text:
        raise ValueError(f"{path}: TOOLS_TEMPLATE: expected the field {SCHEMAS_FIELD}, found none")
    return text


def validate_messages(messages: Sequence[Message]) -> None:
    """Raise ``ValueError``, naming message and field, unless ``encode_chat`` can take ``messages``.

    A system message comes first, an assistant message follows a user or tool message, a tool
    message follows an assistant message with calls or another tool message, a latest_reminder
    stands before a user message, and the last message is a user or tool message.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(f"messages: expected a list of messages, found {type(messages).__name__}")
    if not messages:
        raise ValueError("messages: expected at least one message, found an empty list")
    before: str | None = None
    calls: list[Message] = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        role = _checked_role(message, where, before)
        if role == "assistant":
            calls = message.get("tool_calls") or []
        _check_fields(message, where, role)
        if role == "tool":
            _check_result(message, where, calls)
        before = role
    if before not in ("user", "tool"):
        raise ValueError(f"{where}: role: expected user or tool for the last, found {before}")


def _checked_role(message: object, where: str, before: str | None) -> str:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where}: expected an object, found {type(message).__name__}")
    known = ", ".join(_PREDECESSORS)
    if "role" not in message:
        raise ValueError(f"{where}: field role is missing; expected one of {known}")
    role = message["role"]
    if not isinstance(role, str) or role not in _PREDECESSORS:
        raise ValueError(f"{where}: role: expected one of {known}, found {role!r}")
    allowed = _PREDECESSORS[role]
    if before not in allowed or (before == "latest_reminder" and role != "user"):
        expected = " or ".join("the beginning" if name is None else name for name in allowed)
        found = before or "the beginning"
        raise ValueError(f"{where}: role: expected {role} directly after {expected}, found {found}")
    return role


def _check_fields(message: Message, where: str, role: str) -> None:
    content = message.get("content")
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        found = "nothing" if content is None else type(content).__name__
        raise ValueError(f"{where}: content: expected a string, found {found}")
    if not isinstance(_reasoning(message), str):
        found = type(_reasoning(message)).__name__
        raise ValueError(f"{where}: reasoning: expected a string, found {found}")
    calls = message.get("tool_calls") or []
    if calls and role != "assistant":
        raise ValueError(f"{where}: tool_calls: expected for assistant only, found for {role}")
    if not isinstance(calls, list):
        raise ValueError(f"{where}: tool_calls: expected a list, found {type(calls).__name__}")
    for index, call in enumerate(calls):
        _normalized_call(call, f"{where}: tool_calls[{index}]")


def _check_result(message: Message, where: str, calls: Sequence[Message]) -> None:
    if not calls:
        raise ValueError(f"{where}: role: expected tool after an assistant message with tool_calls")
    known = [call["id"] for call in calls if call.get("id")]
    found = message.get("tool_call_id")
    if known and found is not None and found not in known:
        raise ValueError(f"{where}: tool_call_id: expected one of {known}, found {found!r}")


def _reasoning(message: Message) -> Any:
    return message.get("reasoning", message.get("reasoning_content")) or ""


def _normalized_call(call: object, where: str) -> ToolCall:
    """A call from ``{name, arguments}`` or ``{function: {name, arguments}}``."""
    body = call.get("function", call) if isinstance(call, Mapping) else call
    if not isinstance(body, Mapping):
        raise ValueError(f"{where}: expected an object, found {type(body).__name__}")
    name, arguments = body.get("name"), body.get("arguments")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where}: name: expected a string that is not empty, found {name!r}")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: arguments: expected JSON, found {error}") from error
    if not isinstance(arguments, Mapping):
        found = type(arguments).__name__
        raise ValueError(f"{where}: arguments: expected an object or its JSON text, found {found}")
    return ToolCall(name, dict(arguments))


def encode_chat(
    messages: Sequence[Message],
    *,
    thinking: Thinking = "off",
    tools: Sequence[Mapping[str, Any]] | None = None,
    drop_reasoning: bool = True,
    texts: PromptTexts = DEFAULT_TEXTS,
) -> str:
    """The prompt for the assistant's next turn, BOS included; to be encoded without adding tokens.

    A message is ``{role, content}`` with role system, user, assistant, tool or latest_reminder; an
    assistant's may have ``reasoning`` (or ``reasoning_content``) and ``tool_calls``, each
    ``{name, arguments}`` or ``{id, function: {name, arguments}}`` with the arguments as an object
    or its JSON text; a tool's may have ``tool_call_id``. ``tools`` are ``{name, description,
    parameters}`` or ``{function: {...}}``.

    Adjacent tool and user messages form one user turn, results in the order of the calls that they
    answer. With ``drop_reasoning`` the reasoning of earlier turns is left out, unless there are
    ``tools``. With thinking "off" no reasoning is written. Raises ``ValueError`` as
    ``validate_messages`` does, and for an unknown ``thinking`` or a malformed tool.
    """
    validate_messages(messages)
    check_thinking(thinking)
    keep_reasoning = thinking != "off" and (bool(tools) or not drop_reasoning)
    parts = [BOS, texts.effort_max if thinking == "max" else ""]
    rest = list(messages)
    if rest[0]["role"] == "system":
        parts.append(rest.pop(0)["content"])
    if tools:
        schemas = "\n".join(_tool_schema(tool, f"tools[{i}]") for i, tool in enumerate(tools))
        parts.append("\n\n" + texts.tools_preamble.replace(SCHEMAS_FIELD, schemas))
    last_assistant: Message = {}
    for role, turn in groupby(rest, lambda m: "user" if m["role"] == "tool" else m["role"]):
        if role == "user":
            parts += [_user_turn(turn, last_assistant), THINK if keep_reasoning else END_THINK]
        elif role == "assistant":
            last_assistant = next(turn)
            parts.append(_assistant_turn(last_assistant, keep_reasoning))
        else:
            parts.append(REMINDER + next(turn)["content"])
    parts[-1] = END_THINK if thinking == "off" else THINK  # the turn to be written
    return "".join(parts)


def check_thinking(thinking: str) -> None:
    """Raise ``ValueError`` unless ``thinking`` is "off", "on" or "max"."""
    if thinking not in get_args(Thinking):
        expected = ", ".join(get_args(Thinking))
        raise ValueError(f"thinking: expected one of {expected}, found {thinking!r}")


def _user_turn(turn: Iterable[Message], answered: Message) -> str:
    """A user turn, results first, up to the marker of the assistant turn that follows it."""
    results, questions = [], []
    for message in turn:
        (results if message["role"] == "tool" else questions).append(message)
    calls = answered.get("tool_calls") or []
    rank = {str(call["id"]): index for index, call in enumerate(calls) if call.get("id")}
    results.sort(key=lambda result: rank.get(str(result.get("tool_call_id")), 0))
    blocks = [f"<tool_result>{result['content']}</tool_result>" for result in results]
    blocks += [question["content"] for question in questions]
    return USER + "\n\n".join(blocks) + ASSISTANT


def _assistant_turn(message: Message, keep_reasoning: bool) -> str:
    reasoning = _reasoning(message) + END_THINK if keep_reasoning else ""
    calls = [_normalized_call(call, "tool_calls") for call in message.get("tool_calls") or []]
    block = "\n".join([CALLS, *map(_invoke_element, calls), END_CALLS])
    return reasoning + (message.get("content") or "") + ("\n\n" + block if calls else "") + EOS


def _invoke_element(call: ToolCall) -> str:
    parameters = "\n".join(_parameter_elements(call))
    return f'<{DSML}invoke name="{call.name}">\n{parameters}\n</{DSML}invoke>'


def _parameter_elements(call: ToolCall) -> Iterator[str]:
    for name, value in call.arguments.items():
        is_string = isinstance(value, str)
        text = value if is_string else _to_json(value, f"argument {name} of {call.name}")
        flag = "true" if is_string else "false"
        yield f'<{DSML}parameter name="{name}" string="{flag}">{text}</{DSML}parameter>'


def _tool_schema(tool: object, where: str) -> str:
    schema = tool.get("function", tool) if isinstance(tool, Mapping) else tool
    if not isinstance(schema, Mapping) or not isinstance(schema.get("name"), str):
        raise ValueError(f"{where}: expected an object with a name, found {schema!r}")
    return _to_json(schema, where)


def _to_json(value: object, where: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError as error:
        raise ValueError(f"{where}: expected a JSON value, found: {error}") from error


def parse_completion(text: str, *, thinking: Thinking) -> Completion:
    """Split what the model wrote after a prompt made with ``thinking``; never fails on ``text``.

    Everything from an EOS on is ignored. With thinking on, the text up to ``</think>`` is reasoning
    and, if that marker is missing (the output was cut), all of it is. A block of tool calls counts
    only if it is complete, well-formed and last; otherwise, for instance if it was cut, it stays in
    ``content`` as it is and ``tool_calls`` is empty.
    """
    check_thinking(thinking)
    text = text.partition(EOS)[0]
    reasoning = None
    if thinking != "off":
        reasoning, _, text = text.partition(END_THINK)
    content, opening, block = text.partition(CALLS)
    calls = _parse_calls(block) if opening else None
    if calls is None:
        return Completion(text, reasoning, [])
    return Completion(content.removesuffix("\n\n"), reasoning, calls)


def _parse_calls(block: str) -> list[ToolCall] | None:
    """The calls of a block without its opening marker; None unless all of it is well-formed."""
    calls: list[ToolCall] = []
    position = 0
    while invoke := _INVOKE.match(block, position):
        arguments: dict[str, Any] = {}
        position = invoke.end()
        while parameter := _PARAMETER.match(block, position):
            name, is_string, value = parameter.groups()
            if name in arguments:
                return None
            try:
                arguments[name] = value if is_string == "true" else json.loads(value)
            except (ValueError, RecursionError):
                return None
            position = parameter.end()
        if not (end := _END_INVOKE.match(block, position)):
            return None
        calls.append(ToolCall(invoke[1], arguments))
        position = end.end()
    return calls if calls and _END_CALLS.match(block, position) else None
