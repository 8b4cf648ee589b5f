"""Reading prompts from files the user names; every complaint names the option and the file."""

import json
from pathlib import Path
from typing import Any


def read_messages(path: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """A JSON file with a list of messages, or an object {messages, tools}."""
    try:
        data = json.loads(read_text(path, "--messages"))
    except json.JSONDecodeError as error:
        raise ValueError(f"--messages: {path}: not valid JSON ({error})") from error
    if isinstance(data, list):
        return data, None
    if not isinstance(data, dict) or not isinstance(data.get("messages"), list):
        raise ValueError(f"--messages: {path}: expected a list of messages or {{messages, tools}}")
    tools = data.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"--messages: {path}: tools: expected a list, found {type(tools).__name__}")
    return data["messages"], tools


def read_text(path: str, option: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{option}: {path}: not valid UTF-8 ({error})") from error
    except OSError as error:
        raise ValueError(f"{option}: {path}: cannot be read ({error.strerror})") from error
