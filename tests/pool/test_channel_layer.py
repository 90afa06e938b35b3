"""The channel layer: what Channels' own tests ask of one, and what PostgreSQL adds."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest

import asyncorm
from tests.support import database, eventually, run_script

pytest.importorskip("channels")
from channels.exceptions import ChannelFull
from channels.layers import channel_layers

from asyncorm.channel_layer import PostgresChannelLayer

pytestmark = pytest.mark.django_db(transaction=True)
LAYER = {"default": {"BACKEND": "asyncorm.channel_layer.PostgresChannelLayer"}}


@pytest.fixture
async def layer() -> AsyncIterator[PostgresChannelLayer]:
    layer = PostgresChannelLayer(capacity=3)
    yield layer
    await layer.flush()
    await asyncorm.close_pools()


async def take(layer: Any, channel: str) -> Any:
    return await asyncio.wait_for(layer.receive(channel), 20)


async def nothing(layer: Any, channel: str) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(layer.receive(channel), 0.3)


# As in Channels' tests of its layer in memory


async def test_send_and_receive_in_order(layer: Any) -> None:
    for number in range(3):
        await layer.send("test-channel", {"type": f"message.{number}"})
    for number in range(3):
        assert await take(layer, "test-channel") == {"type": f"message.{number}"}


async def test_who_waits_gets_it(layer: Any) -> None:
    waiting = asyncio.create_task(take(layer, "test-channel"))
    await asyncio.sleep(0.1)
    await layer.send("test-channel", {"type": "message", "text": "Ahoy-hoy!"})
    assert (await waiting)["text"] == "Ahoy-hoy!"


async def test_capacity(layer: Any) -> None:
    for _ in range(3):
        await layer.send("test-channel", {"type": "message"})
    with pytest.raises(ChannelFull):
        await layer.send("test-channel", {"type": "message"})


async def test_a_channel_of_this_process(layer: Any) -> None:
    channel = await layer.new_channel()
    await layer.send(channel, {"type": "message", "text": "Local only please"})
    assert (await take(layer, channel))["text"] == "Local only please"


async def test_groups(layer: Any) -> None:
    for number in (1, 2, 3):
        await layer.group_add("test-group", f"test-{number}")
    await layer.group_discard("test-group", "test-2")
    await layer.group_send("test-group", {"type": "message"})
    for number in (1, 3):
        assert await take(layer, f"test-{number}") == {"type": "message"}
    await nothing(layer, "test-2")


async def test_a_full_member_does_no_harm(layer: Any, caplog: Any) -> None:
    full, other = await layer.new_channel(), await layer.new_channel()
    await layer.group_add("test-group", full)
    await layer.group_add("test-group", other)
    for number in range(5):
        await layer.group_send("test-group", {"number": number})
        assert await take(layer, other) == {"number": number}
    assert [await take(layer, full) for _ in range(3)] == [{"number": n} for n in range(3)]
    await nothing(layer, full)
    assert f"Channel {full} is full" in caplog.text


@pytest.mark.parametrize("own", [True, False])
async def test_expiry(own: bool) -> None:
    layer = PostgresChannelLayer(expiry=0.1)
    channel = await layer.new_channel() if own else "test-channel"
    await layer.send(channel, {"type": "message"})
    await asyncio.sleep(0.2)
    await nothing(layer, channel)
    await layer.clean()
    async with asyncorm.cursor() as cursor:
        await cursor.execute("SELECT count(*) FROM asyncorm_channel_messages")
        assert await cursor.fetchone() == (0,)
    assert not layer._here().boxes
    await layer.close()
    await asyncorm.close_pools()


async def test_members_expire() -> None:
    layer = PostgresChannelLayer(group_expiry=0.1)
    channel = await layer.new_channel()
    await layer.group_add("test-group", channel)
    await asyncio.sleep(0.2)
    await layer.group_send("test-group", {"type": "message"})
    await nothing(layer, channel)
    assert not layer._here().groups
    await layer.close()
    await asyncorm.close_pools()


@pytest.mark.parametrize("name", ["¯\\_(ツ)_/¯", "chat name", "a" * 101, 7])
async def test_names_are_verified(layer: Any, name: Any) -> None:
    for call in (
        layer.send(name, {}), layer.receive(name), layer.group_add(name, "a"),
        layer.group_add("a", name), layer.group_discard("a", name), layer.group_send(name, {}),
    ):  # fmt: skip
        with pytest.raises(TypeError):
            await call


# What is PostgreSQL's


@pytest.mark.parametrize("size", [10, 7_000, 8_000, 300_000])
async def test_large_messages_keep_their_place(layer: Any, size: int) -> None:
    first, second = await layer.new_channel(), await layer.new_channel()
    for channel in (first, second):
        await layer.group_add("test-group", channel)
    await layer.group_send("test-group", {"text": "\0ü" * size})
    await layer.group_send("test-group", {"text": "after"})
    await layer.send(first, {"bytes": b"\0\xff" * size})
    await layer.send("any", {"text": "x" * size})
    for channel in (first, second):
        assert await take(layer, channel) == {"text": "\0ü" * size}
        assert await take(layer, channel) == {"text": "after"}
    assert await take(layer, first) == {"bytes": b"\0\xff" * size}
    assert await take(layer, "any") == {"text": "x" * size}


async def test_names_longer_than_postgresqls(layer: Any) -> None:
    groups = ["g" * 98 + end for end in "ab"]
    channels = [await layer.new_channel(prefix="p" * 70 + end) for end in "ab"]
    for group, channel in zip(groups, channels, strict=True):
        await layer.group_add(group, channel)
    await layer.group_send(groups[1], {"to": "b"})
    await layer.send(channels[0], {"to": "a"})
    assert await take(layer, channels[1]) == {"to": "b"}
    assert await take(layer, channels[0]) == {"to": "a"}
    await layer.send("q" * 99, {"to": "q"})
    assert await take(layer, "q" * 99) == {"to": "q"}


async def test_names_with_a_prefix_of_longer_letters() -> None:
    layer = PostgresChannelLayer(prefix="é" * 10)
    channel = await layer.new_channel()
    try:
        for size in (35, 45, 90):  # letters; PostgreSQL counts bytes
            await layer.group_add("g" * size, channel)
            await layer.group_send("g" * size, {"size": size})
            assert await take(layer, channel) == {"size": size}
    finally:
        await layer.close()


async def test_equal_messages_of_one_block_all_arrive_when_it_commits(layer: Any) -> None:
    channel = await layer.new_channel()
    await layer.group_add("test-group", channel)
    async with asyncorm.atomic():
        await layer.send(channel, {"type": "same"})
        await layer.send(channel, {"type": "same"})
        await layer.group_send("test-group", {"type": "same"})
        await nothing(layer, channel)
    assert [await take(layer, channel) for _ in range(3)] == [{"type": "same"}] * 3
    with pytest.raises(ZeroDivisionError):
        async with asyncorm.atomic():
            await layer.send(channel, {"type": "never"})
            await layer.send("any", {"type": "never"})
            raise ZeroDivisionError
    await nothing(layer, channel)
    await nothing(layer, "any")


async def test_each_message_of_a_queue_goes_to_one_reader() -> None:
    layers = [PostgresChannelLayer() for _ in range(3)]
    readers = [asyncio.create_task(take(layer, "work")) for layer in layers for _ in range(4)]
    await asyncio.sleep(0.1)
    for number in range(12):
        await layers[0].send("work", {"number": number})
    got = await asyncio.gather(*readers)
    assert sorted(each["number"] for each in got) == list(range(12))
    for layer in layers:
        await layer.close()
    await asyncorm.close_pools()


async def test_a_cancelled_reader_loses_nothing(layer: Any) -> None:
    layer.capacity = 100
    got = []
    for number in range(40):
        waiting = asyncio.create_task(layer.receive("work"))
        await asyncio.sleep(number % 5 * 0.001)
        await layer.send("work", {"number": number})
        await asyncio.sleep(number % 3 * 0.001)
        waiting.cancel()
        await asyncio.wait([waiting])
        if not waiting.cancelled():
            got.append(waiting.result()["number"])
    while len(got) < 40:
        got.append((await take(layer, "work"))["number"])
    assert sorted(got) == list(range(40))


async def test_another_process_and_another_loop_reach_a_consumer(layer: Any) -> None:
    channel = await layer.new_channel()
    script = f"""
import asyncio, django
django.setup()
from asgiref.sync import async_to_sync
from asyncorm.channel_layer import PostgresChannelLayer
layer = PostgresChannelLayer()
async_to_sync(layer.group_add)("test-group", {channel!r})
async_to_sync(layer.send)({channel!r}, {{"from": "send"}})
async_to_sync(layer.group_send)("test-group", {{"from": "group"}})
async_to_sync(layer.group_discard)("test-group", {channel!r})
async_to_sync(layer.send)({channel!r}, {{"from": "last"}})
"""
    result = await asyncio.to_thread(run_script, script, "-W", "ignore")
    assert result.returncode == 0, result.stderr
    got = [await take(layer, channel)]
    while got[-1] != {"from": "last"}:
        got.append(await take(layer, channel))
    # Listening for the group begins a little later than the process has asked for it.
    assert [each for each in got if each != {"from": "group"}] == [
        {"from": "send"}, {"from": "last"}
    ]  # fmt: skip
    assert not layer._here().groups


async def test_a_lost_connection_is_made_anew(layer: Any) -> None:
    channel = await layer.new_channel()
    async with asyncorm.cursor() as cursor:
        await cursor.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%%'"
        )
    async with asyncio.timeout(20):
        while True:
            await layer.send(channel, {"type": "message"})
            try:
                await asyncio.wait_for(layer.receive(channel), 0.2)
                break
            except TimeoutError:
                continue


async def test_what_failed_when_nobody_waited_for_it_is_begun_anew() -> None:
    async def begin() -> None:
        waiting = asyncio.create_task(layer.receive("test-channel"))
        while not layer._here()._listening:  # noqa: ASYNC110
            await asyncio.sleep(0)
        waiting.cancel()  # before it is known that the server cannot be reached
        await asyncio.wait([waiting])
        await eventually(lambda: all(each.done() for each in layer._here()._listening.values()))

    with database(PORT="1", HOST="127.0.0.1") as away:
        layer = PostgresChannelLayer(listen_using=away)
        await begin()
        await layer.close()
        await begin()
        layer.listen_using = "default"  # it can be reached now
        await layer.send("test-channel", {"type": "message"})
        assert await take(layer, "test-channel") == {"type": "message"}
        await layer.flush()


async def test_nothing_listens_after_close(layer: Any) -> None:
    await layer.group_add("test-group", await layer.new_channel())
    await layer.close()
    async with asyncorm.cursor() as cursor:
        await cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN%%'")
        assert await cursor.fetchone() == (0,)


async def test_consumers_of_channels(layer: Any, settings: Any) -> None:
    """Two browsers in a room, by Channels' own consumer and test client."""
    from channels.generic.websocket import AsyncJsonWebsocketConsumer
    from channels.testing import WebsocketCommunicator

    class Room(AsyncJsonWebsocketConsumer):  # type: ignore[misc]
        groups = ["room"]

        async def receive_json(self, content: Any, **kwargs: Any) -> None:
            await self.channel_layer.group_send("room", {"type": "said", "text": content})

        async def said(self, event: Any) -> None:
            await self.send_json(event["text"])

    settings.CHANNEL_LAYERS = LAYER
    browsers = [WebsocketCommunicator(Room.as_asgi(), "/") for _ in range(2)]
    for browser in browsers:
        assert (await browser.connect(timeout=20))[0]
    await browsers[0].send_json_to("hello")
    for browser in browsers:
        assert await browser.receive_json_from(timeout=20) == "hello"
    for browser in browsers:
        await browser.disconnect(timeout=20)
    await channel_layers["default"].close()


def test_importing_asyncorm_does_not_import_channels() -> None:
    script = "import asyncorm, sys; print('channels' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", script], text=True) == "False\n"
