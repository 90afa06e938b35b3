"""Fills the sample shop with rows that are the same on every machine."""

from __future__ import annotations

import datetime as dt
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from django.db.models import Model

Row = tuple[Any, ...]

CATEGORIES = (
    "Audio", "Books", "Camping", "Cycling", "Furniture", "Garden",
    "Kitchen", "Lighting", "Music", "Office", "Tools", "Toys",
)  # fmt: skip
LOOKS = (
    "Amber", "Arctic", "Classic", "Compact", "Copper", "Foldable", "Linen", "Maple",
    "Nordic", "Pocket", "Quiet", "Slate", "Solar", "Travel", "Velvet", "Walnut",
)  # fmt: skip
THINGS = (
    "Backpack", "Chair", "Clock", "Desk Lamp", "Grinder", "Headphones", "Kettle", "Keyboard",
    "Lantern", "Notebook", "Planter", "Radio", "Shelf", "Speaker", "Tent", "Wrench",
)  # fmt: skip
FIRST_NAMES = (
    "Ada", "Alan", "Barbara", "Edsger", "Frances", "Grace", "Guido", "Hedy",
    "Joan", "John", "Katherine", "Linus", "Margaret", "Niklaus", "Radia", "Tim",
)  # fmt: skip
LAST_NAMES = (
    "Allen", "Becker", "Costa", "Dubois", "Eriksen", "Fischer", "Garcia", "Haddad",
    "Ito", "Jansen", "Kowalski", "Lindqvist", "Moreau", "Novak", "Okafor", "Rossi",
)  # fmt: skip
COUNTRIES = (
    "Germany", "France", "Spain", "Japan", "Brazil", "Nigeria",
    "Canada", "Italy", "Poland", "Sweden", "Portugal", "Kenya",
)  # fmt: skip
STATUSES = ("paid", "packed", "shipped", "delivered", "returned")
OPINIONS = ("Broke within a week.", "Not for me.", "Does its job.", "Good value.", "Love it!")
SEED = 20260101
YEAR = dt.datetime(2025, 1, 1, tzinfo=dt.UTC)
SMALLEST = 1_000


@dataclass(frozen=True)
class Sizes:
    """How many rows each table gets; together exactly `rows`."""

    categories: int
    products: int
    customers: int
    orders: int
    reviews: int
    lines: int

    @classmethod
    def of(cls, rows: int) -> Sizes:
        products, customers = rows * 2 // 100, rows * 8 // 100
        orders, reviews = rows * 24 // 100, rows * 10 // 100
        rest = rows - len(CATEGORIES) - products - customers - orders - reviews
        return cls(len(CATEGORIES), products, customers, orders, reviews, rest)


def load(rows: int, advance: Callable[[str, int], None]) -> Sizes:
    """Create the tables and fill them; `advance(table, rows)` is told of the rows as they go in."""
    from django.db import connection

    sizes = Sizes.of(rows)
    tables = _tables(sizes)
    with connection.schema_editor() as editor:
        for model, _ in tables:
            editor.create_model(model)
    for model, values in tables:
        _copy(model, values, advance)
    with connection.cursor() as cursor:
        # The ids came with the rows; both halves then start with the same statistics.
        names = [connection.ops.quote_name(model._meta.db_table) for model, _ in tables]
        cursor.execute(f"VACUUM (ANALYZE) {', '.join(names)}")
    return sizes


@contextmanager
def own_schema(name: str) -> Iterator[None]:
    """A schema for the demo's tables alone, gone afterwards: the database may be somebody's own."""
    from django.db import connection, connections
    from django.db.utils import Error

    quoted = connection.ops.quote_name(name)
    with connection.cursor() as cursor:
        cursor.execute(f"CREATE SCHEMA {quoted}")
    try:
        yield
    finally:
        with suppress(Error):  # the server may be gone already, and the schema with it
            connection.close()
            with connection.cursor() as cursor:
                cursor.execute("SET client_min_messages = warning")
                cursor.execute(f"DROP SCHEMA {quoted} CASCADE")
        connections.close_all()


def _copy(model: type[Model], values: Iterator[Row], advance: Callable[[str, int], None]) -> None:
    from django.db import connection

    quote = connection.ops.quote_name
    columns = ", ".join(quote(str(field.column)) for field in model._meta.concrete_fields)
    name = str(model._meta.verbose_name_plural)
    step = 500
    with connection.cursor() as cursor:
        with cursor.copy(f"COPY {quote(model._meta.db_table)} ({columns}) FROM STDIN") as copy:
            count = 0
            for count, row in enumerate(values, 1):
                copy.write_row(row)
                if count % step == 0:
                    advance(name, step)
        advance(name, count % step)


def _tables(sizes: Sizes) -> list[tuple[type[Model], Iterator[Row]]]:
    from .shop.models import Category, Customer, Order, OrderLine, Product, Review

    return [
        (Category, enumerate(CATEGORIES, 1)),
        (Product, _products(sizes)),
        (Customer, _customers(sizes)),
        (Order, _orders(sizes)),
        (OrderLine, _lines(sizes)),
        (Review, _reviews(sizes)),
    ]


def _popular(dice: random.Random, count: int) -> int:
    """An id from 1 to count; low ones come up more often, as best sellers do."""
    return 1 + int(count * dice.random() ** 2)


def _price(product: int) -> float:
    return 4.99 + product * 7919 % 29_500 / 100


def _products(sizes: Sizes) -> Iterator[Row]:
    dice = random.Random(SEED)
    for pk in range(1, sizes.products + 1):
        name = f"{dice.choice(LOOKS)} {dice.choice(THINGS)} {pk}"
        added = YEAR.date() - dt.timedelta(days=dice.randrange(900))
        yield pk, 1 + pk % sizes.categories, name, _price(pk), dice.randrange(200), added


def _customers(sizes: Sizes) -> Iterator[Row]:
    dice = random.Random(SEED + 1)
    for pk in range(1, sizes.customers + 1):
        name = f"{dice.choice(FIRST_NAMES)} {dice.choice(LAST_NAMES)}"
        email = f"{name.replace(' ', '.').lower()}.{pk}@example.com"
        country = COUNTRIES[_popular(dice, len(COUNTRIES)) - 1]
        yield pk, name, email, country, YEAR.date() - dt.timedelta(days=dice.randrange(1500))


def _orders(sizes: Sizes) -> Iterator[Row]:
    dice = random.Random(SEED + 2)
    for pk in range(1, sizes.orders + 1):
        placed = YEAR + dt.timedelta(days=365 * pk / (sizes.orders + 1))
        yield pk, _popular(dice, sizes.customers), dice.choice(STATUSES), placed


def _lines(sizes: Sizes) -> Iterator[Row]:
    dice = random.Random(SEED + 3)
    for pk in range(1, sizes.lines + 1):
        product = _popular(dice, sizes.products)
        order = 1 + (pk - 1) * sizes.orders // sizes.lines
        yield pk, order, product, dice.randint(1, 4), _price(product)


def _reviews(sizes: Sizes) -> Iterator[Row]:
    dice = random.Random(SEED + 4)
    for pk in range(1, sizes.reviews + 1):
        stars = 5 - int(5 * dice.random() ** 2)
        written = YEAR + dt.timedelta(minutes=dice.randrange(365 * 24 * 60))
        customer = dice.randint(1, sizes.customers)
        yield pk, _popular(dice, sizes.products), customer, stars, OPINIONS[stars - 1], written
