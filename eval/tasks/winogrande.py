"""WinoGrande's sentences, parted at the gap."""

from typing import Any


def right_choice(document: dict[str, Any]) -> int:
    """Return the number of the right name, from 0."""
    return int(document["answer"]) - 1


def contexts(document: dict[str, Any]) -> list[str]:
    """Return what stands before the gap, with each name in it."""
    before, _, _ = document["sentence"].partition("_")
    return [before + document["option1"], before + document["option2"]]


def rest(document: dict[str, Any]) -> str:
    """Return what stands behind the gap."""
    _, _, behind = document["sentence"].partition("_")
    return behind.strip()
