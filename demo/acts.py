"""What Django has no word for: each act is asyncorm alone, first without it and then with it."""

# mypy does not see the methods that asyncorm adds to Django's classes (docs/typing.md).
# mypy: disable-error-code="attr-defined"

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from django.test import override_settings

import asyncorm

from .scenarios import DECEMBER, Rows, slow_query
from .settings import ASYNCORM
from .shop.models import Category, Customer, Order, Product, Review

FIRST = 10_000_000  # a primary key that the shop does not have


def page() -> list[Callable[[], Any]]:
    return [
        lambda: Product.objects.select_related("category").get(pk=7),
        Product.objects.filter(category=7).count,
        lambda: Customer.objects.get(pk=7),
        Order.objects.filter(customer=7).exists,
        lambda: Order.objects.latest("placed_at"),
        lambda: list(Category.objects.order_by("name")),
    ]


async def one_after_another() -> Rows:
    return [await asyncorm.native(operation)() for operation in page()]


async def in_a_batch() -> Rows:
    return await asyncorm.batch(*page())


async def price(product: int) -> Any:
    sql = "SELECT price FROM demo_shop_product WHERE id = %s"
    async with asyncorm.cursor() as cursor:
        await cursor.execute(sql, [product])
        return await cursor.fetchone()


async def prices(count: int) -> Rows:
    return await asyncio.gather(*map(price, range(1, count + 1)))


async def whole_products() -> Rows:
    products = Product.objects.order_by("-pk")[:10]
    relations = ("category", "reviews__customer", "lines__order")
    everything = products.prefetch_related(*relations)
    return [product async for product in everything]


async def without_a_limit() -> Rows:
    return await asyncio.gather(*map(slow_query, range(1, 7)))


async def on_two_connections() -> Rows:
    async with asyncorm.parallelism(2):
        return await asyncio.gather(*map(slow_query, range(1, 7)))


async def export(read_ahead: int) -> Rows:
    sent = []
    orders = Order.objects.order_by("pk")[:1_000]
    stream = orders.native_iterator(chunk_size=200, read_ahead=read_ahead)
    async for order in stream:
        sent.append(order)
        if len(sent) % 200 == 0:
            await asyncio.sleep(0.01)  # send them somewhere
    return sent


async def add_reviews(**how: Any) -> Rows:
    facts = {"product_id": 7, "customer_id": 7, "written_at": DECEMBER}
    keys = range(FIRST, FIRST + 5_000)
    new = [Review(pk=key, stars=5, text="Fine", **facts) for key in keys]
    async with asyncorm.atomic():
        await Review.objects.native_bulk_create(new, **how)
        added = await Review.objects.filter(pk__gte=FIRST).acount()
        asyncorm.set_rollback(True)
    return [added]


@dataclass(frozen=True)
class Act:
    """Two ways to the same rows.

    Attributes:
        names: of the two ways.
        code: the functions to show.
        without: settings of asyncorm for the first way.
    """

    key: str
    title: str
    names: tuple[str, str]
    code: tuple[Callable[..., Any], ...]
    ways: tuple[Callable[[], Awaitable[Rows]], Callable[[], Awaitable[Rows]]]
    note: str = ""
    without: dict[str, Any] = field(default_factory=dict)

    async def run(self, way: int) -> Rows:
        usual = ASYNCORM.extra["ASYNCORM"]
        with override_settings(ASYNCORM=usual if way else {**usual, **self.without}):
            return await self.ways[way]()

    def source(self) -> str:
        """The source of what runs."""
        return "\n\n".join(inspect.getsource(inspect.unwrap(f)).rstrip() for f in self.code)


def acts(products: int, *, quick: bool = False) -> dict[str, Act]:
    """The acts in the order in which they are played."""
    count = min(products, 100 if quick else 400)
    gathered = functools.partial(prices, count)
    made = (
        Act(
            "batch",
            "batch(): a page of 6 queries",
            ("one after another", "batch()"),
            (page, one_after_another, in_a_batch),
            (one_after_another, in_a_batch),
        ),
        Act(
            "multiplexing",
            f"Multiplexing: {count} statements at once, more than there are connections",
            ("MULTIPLEXING off", "MULTIPLEXING on"),
            (price, prices),
            (gathered, gathered),
            without={"MULTIPLEXING": False},
        ),
        Act(
            "prefetch",
            "Parallel prefetch: 10 products with all that belongs to them",
            ("PARALLEL_PREFETCH off", "PARALLEL_PREFETCH on"),
            (whole_products,),
            (whole_products, whole_products),
            without={"PARALLEL_PREFETCH": False},
        ),
        Act(
            "parallelism",
            "parallelism(2): 6 slow queries, on two connections at most",
            ("without", "parallelism(2)"),
            (on_two_connections,),
            (without_a_limit, on_two_connections),
        ),
        Act(
            "read_ahead",
            "read_ahead: a stream whose next chunk travels while one is used",
            ("read_ahead=0", "read_ahead=1"),
            (export,),
            (functools.partial(export, 0), functools.partial(export, 1)),
        ),
        Act(
            "copy",
            'COPY: native_bulk_create(method="copy") of 5,000 rows',
            ("INSERT", "COPY"),
            (add_reviews,),
            (add_reviews, functools.partial(add_reviews, method="copy")),
        ),
    )
    return {act.key: act for act in made}
