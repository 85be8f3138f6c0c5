"""Parameters as a command line gives them."""

import ast

from course_utils.tools import CourseError


def key_and_value(text: str) -> tuple[str, object]:
    """`KEY=VALUE` with the value as Python writes it, or else as text."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise CourseError(f"a parameter is KEY=VALUE, got {text!r}.")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value
