"""``where = "num_experts >= 3 or coupler != 'HGNN'"``: conditions on flags, checked and never executed.

Python's parser reads the text, and the few kinds of nodes allowed here become functions; every other
kind is refused. Nothing is looked up but the flags, and nothing is called.
"""

from __future__ import annotations

import ast
import io
import operator
import tokenize
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from gnnmoe.config import Refused, unknown_name

Values = Mapping[str, Any]
Evaluate = Callable[[Values], Any]

MAX_LENGTH = 2000
MAX_DEPTH = 100
ALLOWED = (
    "allowed are flags, numbers, text in quotes, true, false, None, lists [..], == != < <= > >=, in, not in,"
    " and, or, not, + - * / % and parentheses"
)
WORDS = {"true": True, "false": False}
KINDS = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}
ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.Mod: operator.mod,
}  # fmt: skip
ORDERINGS: dict[type, Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip
EQUALITIES = (ast.Eq, ast.NotEq, ast.In, ast.NotIn)
HINTS: dict[type, str] = {
    ast.Tuple: "write a list, [..]", ast.Is: "write ==", ast.IsNot: "write !=",
    ast.JoinedStr: "write plain text",
}  # fmt: skip


@dataclass(frozen=True)
class Condition:
    """A condition on the flags of a run."""

    text: str
    evaluate: Evaluate

    def holds(self, values: Values) -> bool:
        """Return whether the condition is true of a run with these flags, all of them by field.

        Raises:
            Refused: two values cannot be compared or calculated with, or the result is not true or
                false; it names the column.
        """
        return self.evaluate(values)


def parse_condition(
    text: str, names: Mapping[str, str], refused: Mapping[str, str] | None = None
) -> Condition:
    """Return the condition that ``text`` writes.

    ``names`` gives the field of every name that may stand in it, ``refused`` why another name may not.

    Raises:
        Refused: the text is no condition, or holds what none may; it names the column and what is
            allowed.
    """
    line = " ".join(text.splitlines()).strip()
    tree = _parsed(line)
    return Condition(line, _Compiler(line, names, refused or {}).truth(tree.body))


def _parsed(line: str) -> ast.Expression:
    if not line:
        raise Refused("the condition is empty.")
    if len(line) > MAX_LENGTH:
        raise Refused(f"the condition has {len(line)} characters; at most {MAX_LENGTH} are read.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a strange escape in a text is an error here
            tree = ast.parse(line, mode="eval")
        tokens = list(tokenize.generate_tokens(io.StringIO(line).readline))
    except SyntaxError as error:
        column = error.offset or len(line) + 1
        rest = repr(line[column - 1 :][:20]) if column <= len(line) else "the end"
        raise Refused(f"column {column}: {rest} is not understood; {ALLOWED}.") from None
    except (ValueError, MemoryError, RecursionError, tokenize.TokenError):
        raise Refused(f"the condition is not understood; {ALLOWED}.") from None
    for token in tokens:
        if token.type == tokenize.COMMENT:  # it would swallow the lines after it
            raise Refused(f"column {token.start[1] + 1}: a comment cannot stand here; {ALLOWED}.")
    level: list[ast.AST] = [tree]
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in ast.iter_child_nodes(node)]
    if level:
        raise Refused(f"the condition is nested deeper than {MAX_DEPTH} levels.")
    return tree


class _Compiler:
    """Makes functions of the flags from the nodes that are allowed."""

    def __init__(self, line: str, names: Mapping[str, str], refused: Mapping[str, str]) -> None:
        self.line, self.names, self.refused = line, names, refused

    def value(self, node: ast.AST) -> Evaluate:
        match node:
            case ast.Constant():
                return self._constant(node)
            case ast.Name():
                return self._name(node)
            case ast.List(elts=items):
                found = [self.value(item) for item in items]
                return lambda values: [item(values) for item in found]
            case ast.BoolOp(op=op, values=terms):
                found, combine = [self.truth(term) for term in terms], all if isinstance(op, ast.And) else any
                return lambda values: combine(term(values) for term in found)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                inner = self.truth(operand)
                return lambda values: not inner(values)
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
                number, factor = self._number(operand), -1 if isinstance(sign, ast.USub) else 1
                return lambda values: factor * number(values)
            case ast.BinOp(op=op) if type(op) in ARITHMETIC:
                return self._arithmetic(node)
            case ast.Compare():
                return self._comparison(node)
        self._refuse(node, f"{self._text(node)!r} cannot stand here; {HINTS.get(type(node), ALLOWED)}")

    def truth(self, node: ast.AST) -> Evaluate:
        """Compile a node that must be true or false."""
        inner = self.value(node)

        def evaluate(values: Values) -> bool:
            found = inner(values)
            if not isinstance(found, bool):
                self._refuse(
                    node, f"{self._shown(node, found)} must be true or false; compare it with a value"
                )
            return found

        return evaluate

    def _number(self, node: ast.AST) -> Evaluate:
        inner = self.value(node)

        def evaluate(values: Values) -> int | float:
            found = inner(values)
            if _kind(found) != "a number":
                self._refuse(
                    node, f"{self._shown(node, found)} cannot be calculated with; it must be a number"
                )
            return found

        return evaluate

    def _constant(self, node: ast.Constant) -> Evaluate:
        value = node.value
        if value is not None and type(value) not in KINDS:
            self._refuse(node, f"{self._text(node)!r} cannot stand here; {ALLOWED}")
        value = None if value == "None" else value  # as in the blocks of the file
        return lambda _: value

    def _name(self, node: ast.Name) -> Evaluate:
        if node.id in WORDS:
            return lambda _: WORDS[node.id]
        if node.id in self.refused:
            self._refuse(node, f"{node.id} cannot stand here: {self.refused[node.id]}")
        if node.id not in self.names:
            self._refuse(node, unknown_name("name", node.id, self.names).removesuffix("."))
        return operator.itemgetter(self.names[node.id])

    def _arithmetic(self, node: ast.BinOp) -> Evaluate:
        left, right, calculate = self._number(node.left), self._number(node.right), ARITHMETIC[type(node.op)]

        def evaluate(values: Values) -> int | float:
            try:
                return calculate(left(values), right(values))
            except ArithmeticError as error:
                self._refuse(node, f"{self._text(node)!r} has no value: {error}")

        return evaluate

    def _comparison(self, node: ast.Compare) -> Evaluate:
        operands = [node.left, *node.comparators]
        for op, right in zip(node.ops, node.comparators, strict=True):
            if type(op) not in ORDERINGS and not isinstance(op, EQUALITIES):
                self._refuse(node, f"{self._text(node)!r} cannot stand here; {HINTS.get(type(op), ALLOWED)}")
            if isinstance(op, ast.In | ast.NotIn) and isinstance(right, ast.List) and not right.elts:
                self._refuse(right, "the list is empty")
        found = [self.value(operand) for operand in operands]

        def evaluate(values: Values) -> bool:
            left = found[0](values)
            for place, op in enumerate(node.ops):
                right = found[place + 1](values)
                if not self._compare(op, operands[place], left, operands[place + 1], right):
                    return False
                left = right
            return True

        return evaluate

    def _compare(self, op: ast.cmpop, left_node: ast.AST, left: Any, right_node: ast.AST, right: Any) -> bool:
        if isinstance(op, ast.In | ast.NotIn):
            if not isinstance(right, list):
                self._refuse(right_node, f"{self._shown(right_node, right)} must be a list, after in")
            for item in right:
                self._check_kinds(left_node, left, right_node, item)
            return (left in right) is isinstance(op, ast.In)
        if type(op) in ORDERINGS:
            for node, value in ((left_node, left), (right_node, right)):
                if _kind(value) != "a number":
                    note = "; ask for != None first" if value is None else ""
                    self._refuse(
                        node, f"{self._shown(node, value)} has no order; only numbers have one{note}"
                    )
            return ORDERINGS[type(op)](left, right)
        self._check_kinds(left_node, left, right_node, right)
        return (left == right) is isinstance(op, ast.Eq)

    def _check_kinds(self, left_node: ast.AST, left: Any, right_node: ast.AST, right: Any) -> None:
        if None not in (left, right) and _kind(left) != _kind(right):
            pair = f"{self._shown(left_node, left)} and {self._shown(right_node, right)}"
            self._refuse(left_node, f"{pair} cannot be compared")

    def _shown(self, node: ast.AST, value: Any) -> str:
        """Say what stands there and its value: ``num_experts = 4 (a number)``."""
        name = f"{self._text(node)} = " if isinstance(node, ast.Name) and node.id not in WORDS else ""
        return f"{name}{value!r}" + (f" ({_kind(value)})" if value is not None else "")

    def _text(self, node: ast.AST) -> str:
        return (ast.get_source_segment(self.line, node) or self.line)[:40]

    def _refuse(self, node: ast.AST, reason: str) -> NoReturn:
        offset = getattr(node, "col_offset", 0)  # in bytes
        raise Refused(f"column {len(self.line.encode()[:offset].decode()) + 1}: {reason}.")


def _kind(value: Any) -> str:
    return KINDS.get(type(value), "None")
