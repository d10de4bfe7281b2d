"""Hyperedges from a JSON file: a list of member lists, refused with the line of what is wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from gnnmoe.config import Refused

BLANKS = " \t\r\n"  # as JSON has them


def read_hyperedges(path: str, num_experts: float = math.inf) -> list[tuple[int, ...]]:
    """Return the hyperedges in the order of the file, the members of each sorted.

    Raises:
        Refused: no such file, not UTF-8, not JSON, or not a list of lists of different experts
            from 0 to E − 1, none empty and none twice. Names the file and the hyperedge's line.
    """
    line_of: dict[tuple[int, ...], int] = {}
    for line, element in _elements(path, _text(path)):
        problem = _problem(element, num_experts)
        edge = () if problem else tuple(sorted(element))
        if edge in line_of:
            problem = f"hyperedge {list(edge)} is in line {line_of[edge]} already"
        if problem:
            raise Refused(f"{path}, line {line}: {problem}.")
        line_of[edge] = line
    return list(line_of)


def _text(path: str) -> str:
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        reason = getattr(error, "strerror", None) or error
        raise Refused(f"{path}: the file of hyperedges cannot be read ({reason}).") from None
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise Refused(f"{path}, line {line}: not UTF-8 ({error.reason}).") from None


def _elements(path: str, text: str) -> list[tuple[int, Any]]:
    """Return each element of the outer list, after the line on which it begins."""
    decoder, found, line = json.JSONDecoder(), [], 1
    try:
        whole = decoder.decode(text)
    except json.JSONDecodeError as error:
        raise Refused(f"{path}, line {error.lineno}: not JSON ({error.msg}).") from None
    except (RecursionError, ValueError) as error:  # ValueError: an integer of 5,000 digits
        raise Refused(f"{path}: not a list of lists of experts ({error}).") from None
    start = len(text) - len(text.lstrip(BLANKS))
    line += text.count("\n", 0, start)
    if not isinstance(whole, list):
        raise Refused(f"{path}, line {line}: not a list; the file must be a list of lists of experts.")
    end = start + 1
    for _ in whole:  # valid JSON: only blanks and commas stand between the elements
        start = end
        while text[start] in BLANKS + ",":
            start += 1
        line += text.count("\n", end, start)
        element, end = decoder.raw_decode(text, start)
        found.append((line, element))
        line += text.count("\n", start, end)
    return found


def _problem(element: Any, num_experts: float) -> str:
    """Return what is wrong with one hyperedge; nothing where it is right."""
    if not isinstance(element, list):
        return f"{json.dumps(element)} is not a list; the file must be a list of lists of experts"
    for member in element:  # all types first: to Python, true is 1 once more
        if type(member) is not int:
            return f"member {json.dumps(member)} is not an integer"
    for member in element:
        if not 0 <= member < num_experts:
            count = "" if num_experts == math.inf else f" for {num_experts} experts"
            return f"member {member} is out of range{count}; experts are counted from 0"
        if element.count(member) > 1:
            return f"member {member} is there more than once"
    return "" if element else "the hyperedge is empty"
