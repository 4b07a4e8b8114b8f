"""Commands as a person types them."""

from __future__ import annotations

import pytest

from workstation.cli.main import main


def run(*arguments: str) -> int:
    """The exit code of `ws ARGUMENTS`."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    return int(caught.value.code or 0)


def main_ends(*arguments: str) -> None:
    assert run(*arguments) == 0
