"""Checks of single numbers that a user passes in. Every message names the argument, the rule and the value."""

from __future__ import annotations

import numbers
import sys


def as_int(value: object) -> int | None:
    """``value`` as an int where it is one, those of numpy included; None for anything else, a bool too.

    Example:
        >>> as_int(3), as_int(3.0), as_int(True)
        (3, None, None)
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    return int(value) if isinstance(value, numbers.Integral) else None


def as_number(value: object) -> int | float | None:
    """``value`` as an int or a float where it is a number, those of numpy included; None for anything else, a bool too.

    Example:
        >>> as_number(0.5), as_number(3), as_number("3")
        (0.5, 3, None)
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return value
    if not isinstance(value, numbers.Real):
        return None
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def integer(name: str, value: object, minimum: int) -> int:
    """``value`` as an int, which must be at least ``minimum``; ints of numpy are taken too.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.

    Example:
        >>> integer("frames", 0, 1)
        Traceback (most recent call last):
        ValueError: frames must be at least 1, got 0
    """
    number = as_int(value)
    if number is None:
        raise TypeError(f"{name} must be an int, got {value!r}")
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return number


def positive(name: str, value: object) -> int | float:
    """``value`` as an int or a float, which must be positive and finite; numbers of numpy are taken too.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.

    Example:
        >>> positive("theta", -1.0)
        Traceback (most recent call last):
        ValueError: theta must be positive and finite, got -1.0
    """
    number = as_number(value)
    if number is None:
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 < number <= sys.float_info.max:
        raise ValueError(f"{name} must be positive and finite, got {value!r}")
    return number


def check_flags(**flags: object) -> None:
    """Raises TypeError unless every flag is a bool: the truth of other objects may not be what was meant.

    Raises:
        TypeError: naming the argument and the value.

    Example:
        >>> check_flags(inverse=True, exact=1)
        Traceback (most recent call last):
        TypeError: exact must be a bool, got 1
    """
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be a bool, got {value!r}")
