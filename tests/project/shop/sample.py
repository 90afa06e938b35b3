"""A small deterministic stock of rows for the bookshop, with the odd cases that real data has."""

import datetime as dt
import uuid
from decimal import Decimal
from typing import Any

from django.apps import apps
from django.contrib.auth.models import Group, Permission, User
from django.contrib.contenttypes.models import ContentType
from django.contrib.postgres.search import SearchVector
from django.core.management.color import no_style
from django.db import connections, router, transaction
from django.db.backends.postgresql.psycopg_any import (
    DateRange,
    DateTimeTZRange,
    NumericRange,
)

from tests.project.shop import models as m

UTC = dt.UTC


def moment(day: int, hour: int = 12) -> dt.datetime:
    """A time `day` days after New Year 2024, across the changes of daylight saving time."""
    return dt.datetime(2024, 1, 1, hour, 30, 15, 123456, tzinfo=UTC) + dt.timedelta(days=day)


def uid(number: int) -> uuid.UUID:
    return uuid.UUID(int=0x1234_5678 << 96 | number)


def load(using: str) -> None:
    """Fill the empty database; keys are explicit, so that every load gives the same rows."""
    with transaction.atomic(using=using):
        people(using)
        books(using)
        shop(using)
        rest(using)
        # Keys that the database makes up go on behind the explicit ones.
        sequences = connections[using].ops.sequence_reset_sql(
            no_style(),
            [model for model in apps.get_models() if router.allow_migrate_model(using, model)],
        )
        with connections[using].cursor() as cursor:
            for statement in sequences:
                cursor.execute(statement)


def people(using: str) -> None:
    m.Country.objects.using(using).bulk_create(
        m.Country(code=code, name=name)
        for code, name in [
            ("AT", "Austria"),
            ("DE", "Germany"),
            ("FR", "France"),
            ("CI", "Côte d'Ivoire"),
        ]
    )
    m.Publisher.objects.using(using).bulk_create(
        m.Publisher(pk=n, name=name, country_id=country, founded=founded)
        for n, (name, country, founded) in enumerate(
            [
                ("Addison", "DE", dt.date(1942, 3, 1)),
                ("Blauwald", "AT", dt.date(1999, 12, 31)),
                ("Cœur", "FR", None),
                ("Nobody & Sons", None, dt.date(1815, 6, 18)),
                ("Empty House", "CI", dt.date(2020, 2, 29)),
            ],
            start=1,
        )
    )
    for n in range(1, 5):
        m.Person(
            pk=n,
            name=f"Person {n}",
            email=None if n == 2 else f"p{n}@example.com",
            born=dt.date(1980 + n, n, 2 * n),
        ).save(using=using, force_insert=True)
    # Multi-table inheritance cannot be created in bulk.
    for n in range(11, 19):
        kind = m.StarAuthor if n in (14, 17) else m.Author
        kind(
            pk=n,
            name=["Ada", "Béla", "Çelik", "Dörte", "Émile", "Fatma", "Gödel", "Ada"][n - 11],
            email=f"a{n}@example.org" if n % 3 else None,
            born=dt.date(1900 + 7 * n % 90, n % 12 + 1, n) if n != 13 else None,
            pen_name="" if n % 2 else f"Pen {n}",
            mentor_id={12: 11, 13: 11, 14: 12, 15: 14, 18: 18}.get(n),
            **({"stars": n - 10} if kind is m.StarAuthor else {}),
        ).save(using=using, force_insert=True)
    one = m.Person.objects.using(using).get(pk=1)
    one.friends.add(2, 3, 11)
    author = m.Author.objects.using(using).get(pk=15)
    author.influences.add(11, 12, 14)
    m.Author.objects.using(using).get(pk=12).influences.add(15, 11)


def books(using: str) -> None:
    m.Tag.objects.using(using).bulk_create(
        m.Tag(pk=n, name=name, weight=weight)
        for n, (name, weight) in enumerate(
            [
                ("classic", 5),
                ("crime", -2),
                ("poetry", 0),
                ("science", 7),
                ("used", 1),
                ("unused", 0),
            ],
            start=1,
        )
    )
    words = ["Sea", "Night", "Öl", "100% Pure", "Under_score", "Sea", "Quote's", "Back\\slash"]
    m.Book.objects.using(using).bulk_create(
        m.Book(
            pk=n,
            created=moment(31 * n, n % 24),
            changed=moment(31 * n + 3) if n % 3 else None,
            title=f"{words[n % len(words)]} {n // 2}",
            isbn=f"978{n:010d}" if n % 5 else None,
            slug=f"book-{n}",
            website=f"https://example.com/{n}?a=1&b=%20" if n % 2 else "",
            language=["de", "en", "fr"][n % 3],
            publisher_id=[None, 1, 2, 3, 4, 1, 2][n % 7],
            price=Decimal(n * 7 % 40) + Decimal("0.95"),
            pages=n * 37 % 500,
            # Sums of these are exact, whatever order the server adds them in.
            rating=None if n % 4 == 0 else n * 23 % 320 / 64,
            sold=n * 10**11 if n % 6 == 0 else n,
            published=dt.date(2015 + n % 9, n % 12 + 1, n % 28 + 1) if n % 8 else None,
            in_print=n % 3 != 1,
            audio_length=dt.timedelta(hours=n, seconds=17, microseconds=5) if n % 2 else None,
            data={
                "shelf": f"S{n % 4}",
                "dims": {"w": n, "h": n * 1.5},
                "editions": [{"year": 2000 + n, "copies": 10 * n}, {"year": 2010 + n}][: n % 3],
                "sale": None if n % 5 == 0 else n % 2 == 0,
            }
            if n != 7
            else {},
            extra=[None, 0, "text", [1, 2, {"deep": [None, True]}], {"k": "ü", "": 1}, 1.5, False][
                n % 7
            ],
            keywords=[["sea", "ship"], [], ["night", "sea", "night"], ["a,b", 'q"uote', "NULL"]][
                n % 4
            ],
            matrix=[[[1, 2], [3, n]], None, []][n % 3],
            sample=f"samples/{n}.pdf" if n % 4 == 1 else "",
        )
        for n in range(1, 31)
    )
    m.Authorship.objects.using(using).bulk_create(
        m.Authorship(
            pk=10 * n + k,
            book_id=n,
            author_id=11 + (n * (k + 1) + k) % 8,
            role="writer" if k == 0 else "editor",
            position=k + 1,
        )
        for n in range(1, 28)
        for k in range(2 if n % 3 == 0 and (n + 0) % 8 != (2 * n + 1) % 8 else 1)
    )
    for n in range(1, 31, 2):
        book = m.Book(pk=n)
        book._state.db = using
        book.tags.add(*sorted({1 + n % 5, 1 + n * 2 % 5}))
    first = m.Book.objects.using(using).get(pk=1)
    first.related.add(2, 3, 5)


def shop(using: str) -> None:
    m.Category.objects.using(using).bulk_create(
        m.Category(pk=n, name=name, parent_id=parent)
        for n, name, parent in [
            (1, "all", None),
            (2, "paper", 1),
            (3, "digital", 1),
            (4, "hardcover", 2),
            (5, "paperback", 2),
            (6, "pdf", 3),
            (7, "lonely", None),
        ]
    )
    m.Product.objects.using(using).bulk_create(
        m.Product(
            pk=n,
            sku=uid(n),
            name=f"Product {n}",
            category_id=2 + n % 5,
            book_id=n if n <= 9 else None,
            price=Decimal(n) * Decimal("3.33"),
            stock=n * 5 % 7,
        )
        for n in range(1, 13)
    )
    User.objects.using(using).bulk_create(
        User(
            pk=n,
            username=f"user{n}",
            email=f"user{n}@example.com",
            password="!",
            is_staff=n == 1,
            is_superuser=n == 1,
            date_joined=moment(n),
            last_login=moment(n + 40) if n % 2 else None,
        )
        for n in range(1, 5)
    )
    Group.objects.using(using).bulk_create([Group(pk=1, name="readers"), Group(pk=2, name="staff")])
    first = User.objects.using(using).get(pk=1)
    first.groups.add(1, 2)
    second = User.objects.using(using).get(pk=2)
    second.groups.add(1)
    permissions = Permission.objects.using(using).filter(content_type__app_label="shop")
    second.user_permissions.set(permissions.filter(codename__in=["view_tag", "change_tag"]))
    Group.objects.using(using).get(pk=1).permissions.set(permissions.filter(codename="add_book"))
    m.Customer.objects.using(using).bulk_create(
        m.Customer(
            pk=n,
            name=f"Customer {n}",
            user_id=n if n <= 3 else None,
            joined=moment(-100 * n, 23) if n != 5 else None,
        )
        for n in range(1, 7)
    )
    m.Profile.objects.using(using).bulk_create(
        m.Profile(customer_id=n, bio=f"Bio of {n}\nsecond line", country_id=country)
        for n, country in [(1, "AT"), (2, None), (4, "FR")]
    )
    for n in (1, 2):
        customer = m.Customer.objects.using(using).get(pk=n)
        customer.favourites.add(n, n + 1, 12)
    m.Order.objects.using(using).bulk_create(
        m.Order(
            pk=n,
            customer_id=1 + n % 4,
            placed=moment(20 * n, 2 * n % 24),
            status=1 + n % 3,
            remark=None if n % 2 else f"remark {n}",
        )
        for n in range(1, 13)
    )
    m.OrderLine.objects.using(using).bulk_create(
        m.OrderLine(
            order_id=n, number=k, product_id=1 + (n * k) % 12, quantity=n + k, price=Decimal(k) / 4
        )
        for n in range(1, 11)
        for k in range(1, 2 + n % 3)
    )
    m.Review.objects.using(using).bulk_create(
        m.Review(
            pk=10 * n + k,
            book_id=n,
            customer_id=k if k < 4 else None,
            stars=1 + (n + k) % 5,
            body="" if k == 2 else f"Review {n}/{k}",
            written=moment(n + k),
            _order=4 - k,
        )
        for n in range(1, 13)
        for k in range(1, 1 + n % 5)
    )


def rest(using: str) -> None:
    manager = ContentType.objects.db_manager(using)
    notes: list[tuple[type, int]] = [
        (m.Book, 1), (m.Book, 1), (m.Book, 2), (m.Author, 11), (m.Author, 14),
        (m.Publisher, 1), (m.Publisher, 5), (m.Book, 999),
    ]  # fmt: skip
    m.Note.objects.using(using).bulk_create(
        m.Note(pk=n, content_type=manager.get_for_model(model), object_id=pk, text=f"note {n}")
        for n, (model, pk) in enumerate(notes, start=1)
    )
    m.Event.objects.using(using).bulk_create(
        m.Event(id=uid(n), name=f"Event {n}", **fields)
        for n, fields in enumerate(events(), start=1)
    )
    m.Article.objects.using(using).bulk_create(
        m.Article(pk=n, title=title, body=body)
        for n, (title, body) in enumerate(
            [
                ("Databases", "A connection waits for the server; the query runs on the server."),
                ("Loops", "The event loop runs tasks. A running task blocks the loop."),
                ("Cheese", "Cheese on bread is a meal; cheese & wine is a party."),
                ("Servers", "Many connections make the server slow. Use a pool of connections."),
                ("Empty", ""),
            ],
            start=1,
        )
    )
    m.Article.objects.using(using).exclude(pk=4).update(
        vector=SearchVector("title", weight="A", config="english")
        + SearchVector("body", weight="B", config="english")
    )
    m.Document.objects.using(using).bulk_create(
        m.Document(pk=n, key=f"doc{n}", text=f"text {n}", revision=n, deleted=n == 3)
        for n in range(1, 5)
    )
    m.Basket.objects.using(using).bulk_create(
        m.Basket(pk=n, name=f"basket {n}") for n in range(1, 4)
    )
    m.Basket.tags.through.objects.using(using).bulk_create(
        m.Basket.tags.through(pk=n, basket_id=basket, tag_id=tag)
        for n, (basket, tag) in enumerate([(1, 1), (1, 2), (2, 2)], start=1)
    )
    m.Ticket.objects.using(using).bulk_create(
        m.Ticket(pk=n, title=f"ticket {n}", status="done" if n == 2 else "open", opened=moment(n))
        for n in range(1, 4)
    )


def events() -> list[dict[str, Any]]:
    return [
        {
            "slot": DateTimeTZRange(moment(1), moment(1, 15)),
            "days": DateRange(dt.date(2024, 1, 1), dt.date(2024, 1, 5)),
            "seats": NumericRange(1, 100),
            "fee": NumericRange(Decimal("1.50"), Decimal("9.99"), "[]"),
            "doors": dt.time(19, 30, 0, 7),
            "lasts": dt.timedelta(days=-1, hours=5, milliseconds=3),
            "address": "192.168.0.1",
            "poster": b"\x00\xffPNG'\\",
            "attributes": {"stage": "big", "quiet": None, "a=>b": '"'},
            "host_id": 1,
        },
        {
            "slot": DateTimeTZRange(None, moment(5), "()"),
            "days": DateRange(empty=True),
            "seats": NumericRange(50, None),
            "address": "2001:db8::1",
            "poster": b"",
            "attributes": {},
            "host_id": 14,
        },
        {},
        {"seats": NumericRange(200, 300), "attributes": {"stage": "small"}, "doors": dt.time(0, 0)},
    ]
