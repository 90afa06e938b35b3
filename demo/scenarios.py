"""What the demo runs: plain Django code, word for word the same in both halves."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from django.db.models import (
    Avg,
    CharField,
    Count,
    F,
    Func,
    IntegerField,
    Max,
    Q,
    Sum,
)
from django.db.models.functions import TruncMonth

from .recorder import named
from .requests import CLIENTS, product_page, requests
from .shop.models import Customer, Order, OrderLine, Product

Rows = list[Any]
DECEMBER = datetime(2025, 12, 1, tzinfo=UTC)


class PgSleep(Func):
    function = "pg_sleep"
    output_field = CharField()


class BackendPid(Func):
    function = "pg_backend_pid"
    output_field = IntegerField()


@named
async def slow_query(number: int) -> Product:
    slow = Product.objects.annotate(nap=PgSleep(0.1), backend=BackendPid())
    return await slow.aget(pk=number)


async def slow_queries(count: int) -> Rows:
    return await asyncio.gather(*map(slow_query, range(1, count + 1)))


async def many_gets(count: int, products: int) -> Rows:
    keys = (1 + number % products for number in range(count))
    gets = (Product.objects.aget(pk=key) for key in keys)
    return await asyncio.gather(*gets)


@named
async def revenue_by_month() -> Rows:
    month = TruncMonth("order__placed_at")
    months = OrderLine.objects.annotate(month=month).values("month")
    revenue = months.annotate(revenue=Sum(F("quantity") * F("unit_price")))
    return [row async for row in revenue.order_by("month")]


@named
async def revenue_by_country() -> Rows:
    country = F("order__customer__country")
    countries = OrderLine.objects.values(country=country)
    revenue = countries.annotate(revenue=Sum(F("quantity") * F("unit_price")))
    return [row async for row in revenue.order_by("-revenue")]


@named
async def best_sellers() -> Rows:
    products = Product.objects.select_related("category")
    sold = products.annotate(sold=Sum("lines__quantity")).filter(sold__gt=0)
    return [product async for product in sold.order_by("-sold", "pk")[:10]]


@named
async def best_customers() -> Rows:
    total = Sum(F("orders__lines__quantity") * F("orders__lines__unit_price"))
    spent = Customer.objects.annotate(spent=total).filter(spent__gt=0)
    best = spent.order_by("-spent", "pk")[:10]
    return [customer async for customer in best]


@named
async def best_rated() -> Rows:
    stars = {"stars": Avg("reviews__stars"), "votes": Count("reviews")}
    rated = Product.objects.annotate(**stars).filter(votes__gte=3)
    best = rated.order_by("-stars", "-votes", "pk")[:10]
    return [product async for product in best]


@named
async def running_out() -> Rows:
    lately = Q(lines__order__placed_at__gte=DECEMBER)
    demand = Sum("lines__quantity", filter=lately)
    products = Product.objects.annotate(demand=demand)
    low = products.filter(stock__lt=F("demand"))
    return [product async for product in low.order_by("stock", "pk")[:10]]


@named
async def average_basket() -> Rows:
    total = Sum(F("lines__quantity") * F("lines__unit_price"))
    baskets = Order.objects.annotate(total=total)
    figures = {"average": Avg("total"), "largest": Max("total")}
    return [await baskets.aaggregate(**figures)]


@named
async def latest_orders() -> Rows:
    orders = Order.objects.select_related("customer")
    latest = orders.prefetch_related("lines__product").order_by("-placed_at")
    return [order async for order in latest[:20]]


async def dashboard() -> Rows:
    return await asyncio.gather(
        revenue_by_month(),
        revenue_by_country(),
        best_sellers(),
        best_customers(),
        best_rated(),
        running_out(),
        average_basket(),
        latest_orders(),
    )


@dataclass(frozen=True)
class Scenario:
    """A piece of code to run in both halves, and how to speak of it.

    `note` explains the picture; without one, a legend names the queries.
    """

    key: str
    title: str
    short: str
    note: str
    code: tuple[Callable[..., Awaitable[Any]], ...]
    arguments: tuple[int, ...] = ()

    async def run(self) -> Rows:
        rows: Rows = await self.code[-1](*self.arguments)
        return rows

    def source(self) -> str:
        """The source of the functions that `run` calls, the outermost last."""
        return "\n\n".join(inspect.getsource(inspect.unwrap(f)).rstrip() for f in self.code)


def scenarios(products: int, *, quick: bool = False) -> dict[str, Scenario]:
    """The scenarios of the demo in the order in which they run."""
    slow, gets, asked = 10, 200 if quick else 2_000, 50 if quick else 500
    panels = (
        revenue_by_month,
        revenue_by_country,
        best_sellers,
        best_customers,
        best_rated,
        running_out,
        average_basket,
        latest_orders,
    )
    made = (
        Scenario(
            "slow_queries",
            f"{slow} slow queries, gathered (each waits 100 ms on the server)",
            f"{slow} slow queries",
            "The number says which of the queries it is.",
            (slow_query, slow_queries),
            (slow,),
        ),
        Scenario(
            "gets",
            f"{gets:,} gets, gathered",
            f"{gets:,} gets",
            "",
            (many_gets,),
            (gets, products),
        ),
        Scenario(
            "dashboard",
            f"A dashboard of {len(panels)} independent queries, gathered",
            f"dashboard of {len(panels)} queries",
            "",
            (*panels, dashboard),
        ),
        Scenario(
            "requests",
            f"{asked:,} requests of {CLIENTS} clients, a view with one aget(), seven MIDDLEWARE",
            f"{asked:,} requests",
            "",
            (product_page, requests),
            (asked, products),
        ),
    )
    return {scenario.key: scenario for scenario in made}
