"""The fault harness (chaos.py) for seconds: `make chaos` runs it at length."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from django.test import override_settings

from asyncorm.demo.postgres import postgres_server
from tests import chaos


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    with postgres_server(tcp=True, own=True) as server:
        yield server


# What differs in them is at the server's end, whatever Python and Django are.
SERVERS = ("restart", "large", "zones", "rotate", "burst")


@pytest.mark.parametrize("multiplexing", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fault, marks=pytest.mark.slow if fault in SERVERS else ())
        for fault in chaos.FAULTS
    ],
)
def test_the_bank_survives(
    fault: str, multiplexing: bool, server: Any, django_db_blocker: Any
) -> None:
    async def main() -> chaos.Report:
        async with chaos.bank_at(server) as bank:
            return await chaos.run(bank, fault, chaos.SHORT[fault] / (1 if multiplexing else 2))

    with override_settings(ASYNCORM={"MULTIPLEXING": multiplexing}), django_db_blocker.unblock():
        report = asyncio.run(main())
    assert report.acknowledged
    # A fault that nobody noticed shows nothing.
    assert report.failed + report.cancelled + report.unknown or fault in chaos.QUIET
    assert report.recovery < 30
