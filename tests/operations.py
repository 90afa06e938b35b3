"""The table of operations, reading and writing, whose native outcome must equal the sync one.

An operation is written once, as a coroutine function that gets `do`: `await do(objects, "create",
...)` calls `create`, `native_create` or `acreate` of the objects, as the way under test has it.
"""

import datetime as dt
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from decimal import Decimal
from typing import Any

from django.contrib.auth.models import Group, User
from django.contrib.contenttypes.models import ContentType
from django.db import transaction
from django.db.backends.postgresql.psycopg_any import NumericRange
from django.db.models import (
    Avg,
    Count,
    F,
    Max,
    Min,
    Prefetch,
    Q,
    QuerySet,
    Subquery,
    Sum,
    prefetch_related_objects,
)
from django.db.models.functions import Concat, Upper
from django.shortcuts import get_list_or_404, get_object_or_404

from tests.project.shop.models import (
    AuditEntry,
    Author,
    Authorship,
    Basket,
    Book,
    Category,
    Country,
    Customer,
    Document,
    Event,
    Note,
    Order,
    OrderLine,
    Person,
    PrintedBook,
    Product,
    Profile,
    Publisher,
    Review,
    StarAuthor,
    Tag,
    Ticket,
)
from tests.project.shop.sample import moment, uid
from tests.ways import books


class Do:
    """One way of calling; this one is Django's synchronous one and awaits nothing."""

    async def __call__(self, target: Any, name: str, /, *args: Any, **kwargs: Any) -> Any:
        return getattr(target, name)(*args, **kwargs)

    async def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call any function that uses the ORM."""
        return function(*args, **kwargs)

    async def iterate(self, queryset: Any, **kwargs: Any) -> list[Any]:
        return list(queryset.iterator(**kwargs))

    async def rows(self, queryset: Any) -> list[Any]:
        return list(queryset)


class Native(Do):
    """asyncorm's names, without the swap."""

    async def __call__(self, target: Any, name: str, /, *args: Any, **kwargs: Any) -> Any:
        return await getattr(target, f"native_{name}")(*args, **kwargs)

    async def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        import asyncorm

        return await asyncorm.native(function)(*args, **kwargs)

    async def iterate(self, queryset: Any, **kwargs: Any) -> list[Any]:
        return [row async for row in queryset.native_iterator(**kwargs)]

    async def rows(self, queryset: Any) -> list[Any]:
        return await queryset.anative()


class Swapped(Native):
    """Django's own async names, which the swap makes native."""

    async def __call__(self, target: Any, name: str, /, *args: Any, **kwargs: Any) -> Any:
        return await getattr(target, f"a{name}")(*args, **kwargs)

    async def iterate(self, queryset: Any, **kwargs: Any) -> list[Any]:
        iterator: AsyncIterator[Any] = queryset.aiterator(**kwargs)
        return [row async for row in iterator]

    async def rows(self, queryset: Any) -> list[Any]:
        if not isinstance(queryset, QuerySet):  # a raw one has no async interface in Django
            return await super().rows(queryset)
        return [row async for row in queryset]


Operation = Callable[[Do], Awaitable[Any]]
READS: dict[str, Operation] = {}
WRITES: dict[str, Operation] = {}
# Operations that are to fail, and those that write nothing; the others must not.
RAISES: set[str] = set()
UNCHANGED: set[str] = set()


def named(function: Operation) -> str:
    return function.__name__.replace("_", " ").strip()


def read(function: Operation) -> Operation:
    READS[named(function)] = function
    return function


def write(function: Operation) -> Operation:
    WRITES[named(function)] = function
    return function


def raises(function: Operation) -> Operation:
    RAISES.add(named(function))
    return function


def unchanged(function: Operation) -> Operation:
    UNCHANGED.add(named(function))
    return function


def reads(table: dict[str, Operation]) -> None:
    READS.update(table)


# --- Reading --------------------------------------------------------------------------------------

reads(
    {
        "get": lambda do: do(Book.objects, "get", pk=3),
        "get on a queryset": lambda do: do(books().select_related("publisher"), "get", pk=3),
        "get prefetched": lambda do: do(books().prefetch_related("tags"), "get", pk=3),
        "get values": lambda do: do(Book.objects.values("title"), "get", pk=3),
        "get by q": lambda do: do(Book.objects, "get", Q(isbn=None) & Q(pk=5)),
        "get composite key": lambda do: do(OrderLine.objects, "get", pk=(2, 3)),
        "get of a proxy": lambda do: do(PrintedBook.objects, "get", pk=3),
        "get inherited": lambda do: do(StarAuthor.objects, "get", name="Dörte"),
        "get deferred": lambda do: do(Book.objects.only("title"), "get", pk=4),
        "get of a related manager": lambda do: do(Publisher(pk=1).books, "get", pk=1),
        "get overridden": lambda do: do(Document.objects, "get", key="DOC2"),
        "get using": lambda do: do(Book.objects.using("other"), "get", pk=3),
        "get of a user": lambda do: do(User.objects, "get_by_natural_key", "user2"),
        "first": lambda do: do(Book.objects, "first"),
        "first ordered": lambda do: do(Book.objects.order_by("-pages", "pk"), "first"),
        "first of none": lambda do: do(Book.objects.filter(pk=1000), "first"),
        "first values": lambda do: do(Book.objects.values_list("title", "pk"), "first"),
        "last": lambda do: do(Book.objects, "last"),
        "last ordered": lambda do: do(Book.objects.order_by("-pages", "pk"), "last"),
        "earliest": lambda do: do(Order.objects, "earliest"),
        "earliest by": lambda do: do(Book.objects, "earliest", "created"),
        "latest": lambda do: do(Publisher.objects.filter(founded__isnull=False), "latest"),
        "latest by": lambda do: do(Book.objects, "latest", "-pages", "pk"),
        "count": lambda do: do(Book.objects, "count"),
        "count filtered": lambda do: do(books(in_print=True), "count"),
        "count distinct": lambda do: do(Book.objects.values("language").distinct(), "count"),
        "count sliced": lambda do: do(books()[5:12], "count"),
        "count union": lambda do: do(Tag.objects.union(Tag.objects.all()), "count"),
        "count of a related manager": lambda do: do(Book(pk=1).tags, "count"),
        "count none": lambda do: do(Book.objects.none(), "count"),
        "exists": lambda do: do(books(pk=3), "exists"),
        "exists not": lambda do: do(books(pk=1000), "exists"),
        "exists generic": lambda do: do(Book(pk=1).notes, "exists"),
        "aggregate": lambda do: do(
            Book.objects, "aggregate", n=Count("pk"), price=Sum("price"), rating=Avg("rating"),
            first=Min("published"), last=Max("created"), length=Sum("audio_length"),
        ),
        "aggregate filtered": lambda do: do(
            Book.objects, "aggregate", n=Count("pk", filter=Q(in_print=True)), k=Sum(F("pages") * 2)
        ),
        "aggregate of nothing": lambda do: do(
            books(pk=1000), "aggregate", a=Sum("price"), b=Sum("pages", default=7), c=Count("pk")
        ),
        "aggregate over annotation": lambda do: do(
            Book.objects.annotate(n=Count("reviews")), "aggregate", Avg("n"), Max("n")
        ),
        "aggregate sliced": lambda do: do(books()[:5], "aggregate", Sum("pages")),
        "aggregate of a related manager": lambda do: do(
            Publisher(pk=1).books, "aggregate", Sum("pages")
        ),
        "in bulk": lambda do: do(Book.objects, "in_bulk", [3, 1, 1000]),
        "in bulk all": lambda do: do(Tag.objects, "in_bulk"),
        "in bulk by field": lambda do: do(Tag.objects, "in_bulk", ["crime"], field_name="name"),
        "in bulk of uuids": lambda do: do(Event.objects, "in_bulk", [uid(1), uid(3)]),
        "in bulk of nothing": lambda do: do(Book.objects, "in_bulk", []),
        "in bulk prefetched": lambda do: do(Book.objects.prefetch_related("tags"), "in_bulk", [1]),
        "contains": lambda do: do(Book.objects, "contains", Book(pk=4)),
        "contains not": lambda do: do(books(pk=3), "contains", Book(pk=4)),
        "contains of a related manager": lambda do: do(Book(pk=1).tags, "contains", Tag(pk=2)),
        "explain": lambda do: do(books(pk=1), "explain", costs=False),
        "explain json": lambda do: do(books(pk=1), "explain", format="json", costs=False),
        "iterator": lambda do: do.iterate(books()),
        "iterator chunked": lambda do: do.iterate(books(), chunk_size=4),
        "iterator of values": lambda do: do.iterate(books().values("pk", "title"), chunk_size=7),
        "iterator of values list": lambda do: do.iterate(
            books().values_list("pk", flat=True), chunk_size=30
        ),
        "iterator prefetched": lambda do: do.iterate(
            books().prefetch_related("tags", "publisher__country"), chunk_size=8
        ),
        "iterator with related": lambda do: do.iterate(
            books().select_related("publisher"), chunk_size=11
        ),
        "iterator of nothing": lambda do: do.iterate(books(pk=1000), chunk_size=2),
        "iterator of a related manager": lambda do: do.iterate(
            Publisher(pk=1).books.order_by("pk")
        ),
        "iterator using": lambda do: do.iterate(books().using("other"), chunk_size=9),
        "iterator of a union": lambda do: do.iterate(
            Tag.objects.union(Tag.objects.filter(pk=1)).order_by("name"), chunk_size=2
        ),
        "rows of a related manager": lambda do: do.rows(Book(pk=1).tags.all()),
        "rows of a generic related manager": lambda do: do.rows(Book(pk=1).notes.order_by("pk")),
        "rows of a one to many": lambda do: do.rows(Publisher(pk=1).books.order_by("pk")),
        "rows of a self relation": lambda do: do.rows(Person(pk=1).friends.all()),
        "run a function": lambda do: do.run(
            lambda: [book.publisher and book.publisher.name for book in books()]
        ),
        "run lazy relations": lambda do: do.run(
            lambda: [
                (line, line.order.customer, line.product)
                for line in OrderLine.objects.order_by("pk")
            ]
        ),
        "run prefetch related objects": lambda do: do.run(prefetched_by_hand),
        "run get object or 404": lambda do: do.run(get_object_or_404, Book, pk=3),
        "run get list or 404": lambda do: do.run(get_list_or_404, books(), in_print=True),
        "run content type": lambda do: do.run(ContentType.objects.get_for_model, Book),
        "all permissions of a user": lambda do: with_user(do, "get_all_permissions"),
        "group permissions of a user": lambda do: with_user(do, "get_group_permissions"),
        "user permissions of a user": lambda do: with_user(do, "get_user_permissions"),
        "permission of a user": lambda do: with_user(do, "has_perm", "shop.add_book"),
        "permissions of a user": lambda do: with_user(do, "has_perms", ["shop.add_book"]),
        "module permissions of a user": lambda do: with_user(do, "has_module_perms", "shop"),
        "run user permissions": lambda do: do.run(
            lambda: sorted(User.objects.get(pk=1).get_all_permissions())
        ),
    }
)  # fmt: skip


async def with_user(do: Do, name: str, *args: Any) -> Any:
    # Without the user itself: Django's own async methods cache less on it than the sync ones.
    return await do(await do(User.objects, "get", pk=2), name, *args)


def prefetched_by_hand() -> list[Book]:
    found = list(books(pk__lt=6))
    prefetch_related_objects(found, "tags", Prefetch("reviews", Review.objects.order_by("-pk")))
    return found


@read
async def refresh_from_db(do: Do) -> Any:
    book = Book(pk=3, title="stale")
    book._state.adding, book._state.db = False, "default"
    await do(book, "refresh_from_db")
    return book


@read
async def refresh_some_fields(do: Do) -> Any:
    book = await do(Book.objects, "get", pk=3)
    book.title = book.slug = "stale"
    await do(book, "refresh_from_db", fields=["title", "publisher"])
    return book


@read
async def refresh_from_queryset(do: Do) -> Any:
    book = await do(Book.objects, "get", pk=3)
    book.title = "stale"
    await do(book, "refresh_from_db", from_queryset=Book.objects.select_related("publisher"))
    return book


@read
async def refresh_loads_what_is_deferred(do: Do) -> Any:
    book = await do(Book.objects.only("title"), "get", pk=3)
    await do(book, "refresh_from_db", fields=["pages"])
    return book


@read
async def results_are_cached(do: Do) -> Any:
    queryset = books(pk__lt=5)
    first = await do.rows(queryset)
    return first, await do.rows(queryset), await do(queryset, "count")


@read
async def a_prefetched_relation_is_read_from_its_cache(do: Do) -> Any:
    book = await do(Book.objects.prefetch_related("tags"), "get", pk=3)
    tags = await do.rows(book.tags.all())
    return book, tags, await do(book.tags, "count"), await do(book.tags, "exists")


@read
async def items_are_kept_where_their_prefetch_fails(do: Do) -> Any:
    queryset = books(pk__lt=5).prefetch_related("nothing")
    with suppress(AttributeError):
        await do.rows(queryset)
    return await do(queryset, "first"), await do(queryset, "count"), queryset._prefetch_done


@read
@raises
async def get_nothing(do: Do) -> Any:
    return await do(Book.objects, "get", pk=1000)


@read
@raises
async def get_too_many(do: Do) -> Any:
    return await do(Book.objects, "get", in_print=True)


@read
@raises
async def earliest_of_nothing(do: Do) -> Any:
    return await do(Order.objects.filter(pk=1000), "earliest")


@read
@raises
async def in_bulk_by_a_field_that_is_not_unique(do: Do) -> Any:
    return await do(Book.objects, "in_bulk", ["x"], field_name="title")


@read
@raises
async def iterator_with_a_chunk_size_of_nothing(do: Do) -> Any:
    return await do.iterate(books(), chunk_size=0)


@read
@raises
async def refresh_a_row_that_is_gone(do: Do) -> Any:
    return await do(Book(pk=1000), "refresh_from_db")


@read
@raises
async def aggregate_of_a_field_that_is_not_there(do: Do) -> Any:
    return await do(Book.objects, "aggregate", Sum("nothing"))


# --- Creating -------------------------------------------------------------------------------------


def new_book(**fields: Any) -> dict[str, Any]:
    return {"title": "New", "price": Decimal("9.90"), "created": moment(0)} | fields


@write
async def create(do: Do) -> Any:
    return await do(Book.objects, "create", **new_book(data={"a": [1]}, keywords=["x"]))


@write
async def create_using(do: Do) -> Any:
    return await do(Tag.objects.using("other"), "create", name="elsewhere")


@write
async def create_in_a_related_manager(do: Do) -> Any:
    publisher = await do(Publisher.objects, "get", pk=2)
    return await do(publisher.books, "create", **new_book())


@write
async def create_in_many_to_many(do: Do) -> Any:
    book = await do(Book.objects, "get", pk=2)
    return await do(book.tags, "create", name="fresh")


@write
async def create_through(do: Do) -> Any:
    book = await do(Book.objects, "get", pk=29)
    author = await do(Author.objects, "get", pk=12)
    return await do(Authorship.objects, "create", book=book, author=author, role="ghost")


@write
async def create_generic(do: Do) -> Any:
    book = await do(Book.objects, "get", pk=2)
    return await do(book.notes, "create", text="new note"), await do(
        Note.objects, "create", target=book, text="another"
    )


@write
async def create_inherited(do: Do) -> Any:
    return await do(StarAuthor.objects, "create", name="Zoë", pen_name="Z", stars=3, mentor_id=11)


@write
async def create_with_composite_key(do: Do) -> Any:
    return await do(
        OrderLine.objects, "create", order_id=11, number=7, product_id=2, price=Decimal("1")
    )


@write
async def create_what_the_database_makes_up(do: Do) -> Any:
    return await do(Ticket.objects, "create", title="new", opened=moment(9))


@write
async def create_with_rare_types(do: Do) -> Any:
    event = await do(
        Event.objects, "create", id=uid(77), name="E", seats=NumericRange(1, 5), address="::1",
        attributes={"a": None}, poster=b"\x01", lasts=dt.timedelta(1), doors=dt.time(1, 2),
    )  # fmt: skip
    return event, await do(Event.objects, "get", pk=uid(77))


@write
async def create_with_overridden_save(do: Do) -> Any:
    return await do(Document.objects, "create", key="new")


@write
async def create_with_signals(do: Do) -> Any:
    return await do(Basket.objects, "create", name="new")


@write
async def create_user(do: Do) -> Any:
    user = await do(
        User.objects, "create_user", "new", "n@EXAMPLE.com", None, date_joined=moment(1)
    )
    user.password = ""  # random for an unusable one
    await do(user, "save")
    return user


@write
async def create_review_in_order(do: Do) -> Any:
    return await do(Review.objects, "create", book_id=4, stars=1, written=moment(1))


@write
@raises
async def create_a_duplicate(do: Do) -> Any:
    await do(Tag.objects, "create", name="crime")


@write
@raises
async def create_with_a_broken_foreign_key(do: Do) -> Any:
    await do(Book.objects, "create", **new_book(publisher_id=1000))


@write
@raises
async def create_against_a_check(do: Do) -> Any:
    await do(Book.objects, "create", **new_book(price=Decimal("-1")))


@write
@raises
async def create_with_a_wrong_type(do: Do) -> Any:
    await do(Book.objects, "create", **new_book(pages="many"))


@write
@raises
async def create_too_long(do: Do) -> Any:
    await do(Country.objects, "create", code="XYZ", name="long code")


@write
async def bulk_create(do: Do) -> Any:
    return await do(Book.objects, "bulk_create", [Book(**new_book(title=str(n))) for n in range(7)])


@write
async def bulk_create_in_batches(do: Do) -> Any:
    return await do(Tag.objects, "bulk_create", [Tag(name=f"t{n}") for n in range(7)], batch_size=3)


@write
@unchanged
async def bulk_create_nothing(do: Do) -> Any:
    return await do(Tag.objects, "bulk_create", [])


@write
async def bulk_create_ignoring_conflicts(do: Do) -> Any:
    tags = [Tag(name="crime", weight=99), Tag(name="brand new")]
    return await do(Tag.objects, "bulk_create", tags, ignore_conflicts=True)


@write
async def bulk_create_updating_conflicts(do: Do) -> Any:
    tags = [Tag(name="crime", weight=99), Tag(name="brand new", weight=1)]
    return await do(
        Tag.objects, "bulk_create", tags,
        update_conflicts=True, update_fields=["weight"], unique_fields=["name"],
    )  # fmt: skip


@write
async def bulk_create_with_keys_and_without(do: Do) -> Any:
    return await do(Tag.objects, "bulk_create", [Tag(pk=900, name="a"), Tag(name="b")])


@write
async def bulk_create_with_composite_keys(do: Do) -> Any:
    lines = [OrderLine(order_id=12, number=n, product_id=n, price=1) for n in (1, 2)]
    return await do(OrderLine.objects, "bulk_create", lines)


@write
async def bulk_create_in_a_related_manager(do: Do) -> Any:
    category = await do(Category.objects, "get", pk=7)
    return await do(category.children, "bulk_create", [Category(name="x"), Category(name="y")])


@write
async def bulk_create_what_the_database_makes_up(do: Do) -> Any:
    return await do(
        Ticket.objects, "bulk_create", [Ticket(title=t, opened=moment(1)) for t in "abc"]
    )


@write
@raises
async def bulk_create_a_duplicate(do: Do) -> Any:
    # All or nothing, though the conflict is in the last batch.
    tags = [Tag(name=name) for name in ("n1", "n2", "n3", "crime")]
    await do(Tag.objects, "bulk_create", tags, batch_size=2)


@write
@raises
async def bulk_create_inherited(do: Do) -> Any:
    await do(Author.objects, "bulk_create", [Author(name="x")])


@write
@unchanged
async def get_or_create_gets(do: Do) -> Any:
    return await do(Tag.objects, "get_or_create", name="crime", defaults={"weight": 50})


@write
async def get_or_create_creates(do: Do) -> Any:
    return await do(Tag.objects, "get_or_create", name="unheard", defaults={"weight": lambda: 50})


@write
async def get_or_create_in_a_related_manager(do: Do) -> Any:
    book = await do(Book.objects, "get", pk=1)
    return (
        await do(book.tags, "get_or_create", name="crime"),
        await do(book.tags, "get_or_create", name="unheard"),
        await do(book.notes, "get_or_create", text="n"),
        await do(Publisher(pk=1).books, "get_or_create", slug="book-1"),
    )


@write
async def get_or_create_with_overridden_get(do: Do) -> Any:
    return (
        await do(Document.objects, "get_or_create", key="DOC1"),
        await do(Document.objects, "get_or_create", key="doc99"),
    )


@write
@raises
async def get_or_create_a_conflict(do: Do) -> Any:
    # Not found by its slug, and its number is taken: the IntegrityError is passed on.
    await do(Book.objects, "get_or_create", slug="?", defaults=new_book(isbn="9780000000001"))


@write
async def update_or_create_updates(do: Do) -> Any:
    return await do(
        Tag.objects, "update_or_create", name="crime", defaults={"weight": F("weight") + 7}
    )


@write
async def update_or_create_creates(do: Do) -> Any:
    return await do(
        Tag.objects, "update_or_create", name="unheard",
        defaults={"weight": 1}, create_defaults={"weight": 2},
    )  # fmt: skip


@write
async def update_or_create_in_a_related_manager(do: Do) -> Any:
    book = await do(Book.objects, "get", pk=1)
    return (
        await do(book.tags, "update_or_create", name="crime", defaults={"weight": 4}),
        await do(book.tags, "update_or_create", name="unheard", defaults={"weight": 5}),
        await do(book.notes, "update_or_create", text="note 1", defaults={"text": "changed"}),
        await do(Category(pk=1).children, "update_or_create", name="paper", defaults={"name": "p"}),
    )


# --- Updating -------------------------------------------------------------------------------------


@write
async def save(do: Do) -> Any:
    book = await do(Book.objects, "get", pk=3)
    book.title, book.data, book.price = "Changed", {"new": None}, Decimal("1.10")
    await do(book, "save")
    return book


@write
async def save_new(do: Do) -> Any:
    book = Book(**new_book())
    await do(book, "save")
    return book


@write
async def save_update_fields(do: Do) -> Any:
    book = await do(Book.objects, "get", pk=3)
    book.title = book.slug = "changed"
    await do(book, "save", update_fields=["title"])
    return book


@write
async def save_deferred(do: Do) -> Any:
    book = await do(Book.objects.only("title"), "get", pk=3)
    book.title = "changed"
    await do(book, "save")
    return book


@write
async def save_expression(do: Do) -> Any:
    book = await do(Book.objects, "get", pk=3)
    book.pages = F("pages") + 1
    await do(book, "save")
    await do(book, "refresh_from_db")
    return book


@write
async def save_forced_insert(do: Do) -> Any:
    tag = Tag(pk=500, name="forced")
    await do(tag, "save", force_insert=True)
    return tag


@write
async def save_using(do: Do) -> Any:
    tag = await do(Tag.objects, "get", pk=1)
    tag.name = "moved"
    await do(tag, "save", using="other")
    return tag


@write
async def save_inherited(do: Do) -> Any:
    author = await do(StarAuthor.objects, "get", pk=14)
    author.name, author.pen_name, author.stars = "A", "B", 9
    await do(author, "save")
    return author


@write
async def save_a_parent_as_child(do: Do) -> Any:
    author = Author(person_ptr_id=2, name="Person 2", pen_name="promoted")
    await do(author, "save")
    return author


@write
async def save_proxy(do: Do) -> Any:
    book = await do(PrintedBook.objects, "get", pk=3)
    book.in_print = False
    await do(book, "save")
    return book


@write
async def save_composite_key(do: Do) -> Any:
    line = await do(OrderLine.objects, "get", pk=(2, 1))
    line.quantity = 99
    await do(line, "save")
    return line


@write
async def save_with_related(do: Do) -> Any:
    country = Country(code="XX", name="X")
    await do(country, "save")
    publisher = Publisher(name="P", country=country)
    await do(publisher, "save")
    book = Book(publisher=publisher, **new_book())
    await do(book, "save")
    return book


@write
async def save_overridden(do: Do) -> Any:
    document = await do(Document.objects, "get", pk=1)
    document.text = "changed"
    await do(document, "save")
    return document


@write
async def save_with_signals(do: Do) -> Any:
    basket = await do(Basket.objects, "get", pk=1)
    basket.name = "changed"
    await do(basket, "save", update_fields=["name"])
    return basket


@write
async def save_what_the_database_makes_up(do: Do) -> Any:
    ticket = await do(Ticket.objects, "get", pk=1)
    ticket.title = "shouted"
    await do(ticket, "save")
    await do(ticket, "refresh_from_db")
    return ticket


@write
async def save_last_login(do: Do) -> Any:
    user = await do(User.objects, "get", pk=2)
    user.last_login = moment(100)
    await do(user, "save", update_fields=["last_login"])
    return user


@write
@raises
async def save_update_of_a_row_that_is_gone(do: Do) -> Any:
    await do(Tag(pk=1000, name="x"), "save", force_update=True)


@write
@raises
async def save_with_an_unsaved_relation(do: Do) -> Any:
    await do(Book(publisher=Publisher(name="unsaved"), **new_book()), "save")


@write
@raises
async def save_a_duplicate(do: Do) -> Any:
    tag = await do(Tag.objects, "get", pk=1)
    tag.name = "crime"
    await do(tag, "save")


@write
async def update_(do: Do) -> Any:
    return await do(books(in_print=True), "update", pages=F("pages") + 1, title=Upper("title"))


@write
@unchanged
async def update_of_nothing(do: Do) -> Any:
    return await do(books(pk=1000), "update", pages=1)


@write
async def update_across_relations(do: Do) -> Any:
    return await do(books(publisher__country="DE"), "update", rating=None)


@write
async def update_from_a_subquery(do: Do) -> Any:
    titles = Publisher.objects.order_by("pk").values("name")[:1]
    return await do(books(pk__lt=4), "update", title=Subquery(titles))


@write
async def update_annotated(do: Do) -> Any:
    named = Book.objects.annotate(shown=Concat("title", "slug"))
    return await do(named.filter(pk__lt=4), "update", title=F("shown"))


@write
async def update_inherited(do: Do) -> Any:
    return await do(StarAuthor.objects, "update", name="All", stars=F("stars") + 1, pen_name="")


@write
async def update_a_foreign_key(do: Do) -> Any:
    publisher = await do(Publisher.objects, "get", pk=5)
    return await do(publisher.books.none() | books(publisher=1), "update", publisher=publisher)


@write
async def update_ordered(do: Do) -> Any:
    return await do(Tag.objects.order_by("-weight"), "update", weight=F("weight") * 2)


@write
async def update_in_a_related_manager(do: Do) -> Any:
    return await do(Publisher(pk=1).books, "update", sold=1)


@write
async def update_json(do: Do) -> Any:
    return await do(books(pk__lt=4), "update", data={"x": [1, None]}, extra=None)


@write
@raises
async def update_against_a_check(do: Do) -> Any:
    await do(Product.objects, "update", stock=F("stock") - 3)


@write
@raises
async def update_sliced(do: Do) -> Any:
    await do(books()[:3], "update", pages=1)


@write
async def bulk_update(do: Do) -> Any:
    found = await do.rows(books(pk__lt=8))
    for n, book in enumerate(found):
        book.title, book.pages, book.data = f"bulk {n}", n, {"n": n}
    return await do(Book.objects, "bulk_update", found, ["title", "pages", "data"]), found


@write
async def bulk_update_in_batches(do: Do) -> Any:
    found = await do.rows(books())
    for book in found:
        book.rating = None if book.pk % 2 else 1.0
        book.pages = F("pages") * 2
    return await do(Book.objects, "bulk_update", found, ["rating", "pages"], batch_size=7)


@write
async def bulk_update_inherited(do: Do) -> Any:
    found = await do.rows(Author.objects.order_by("pk"))
    for author in found:
        author.pen_name = f"bulk {author.pk}"
    return await do(Author.objects, "bulk_update", found, ["pen_name"])


@write
@unchanged
async def bulk_update_nothing(do: Do) -> Any:
    return await do(Book.objects, "bulk_update", [], ["title"])


@write
@raises
async def bulk_update_without_fields(do: Do) -> Any:
    await do(Book.objects, "bulk_update", await do.rows(books()), [])


@write
async def refresh_for_update(do: Do) -> Any:
    def locked() -> Any:
        with transaction.atomic():
            book = books().select_for_update().get(pk=2)
            book.pages += 1
            book.save()
            return book, list(books(pk__lt=5).select_for_update(skip_locked=True, no_key=True))

    return await do.run(locked)


# --- Deleting -------------------------------------------------------------------------------------


@write
async def delete(do: Do) -> Any:
    book = await do(Book.objects, "get", pk=15)
    return await do(book, "delete"), book


@write
async def delete_cascades(do: Do) -> Any:
    publisher = await do(Publisher.objects, "get", pk=1)
    return await do(publisher, "delete"), publisher


@write
async def delete_a_queryset(do: Do) -> Any:
    return await do(books(pk__gt=20), "delete")


@write
async def delete_everything_of_a_model(do: Do) -> Any:
    return await do(Review.objects.order_by(), "delete")


@write
@unchanged
async def delete_nothing(do: Do) -> Any:
    return await do(books(pk=1000), "delete")


@write
async def delete_sets_null(do: Do) -> Any:
    return await do(Country.objects.filter(code="DE"), "delete")


@write
async def delete_sets_value(do: Do) -> Any:
    # SET(): the callable queries and creates while the collector is at work.
    return await do(Category.objects.filter(pk=4), "delete")


@write
async def delete_a_tree(do: Do) -> Any:
    await do(Product.objects, "update", category=7)
    return await do(await do(Category.objects, "get", pk=1), "delete")


@write
async def delete_inherited(do: Do) -> Any:
    return await do(await do(StarAuthor.objects, "get", pk=14), "delete")


@write
async def delete_a_parent(do: Do) -> Any:
    return await do(await do(Person.objects, "get", pk=14), "delete")


@write
async def delete_keeping_the_parent(do: Do) -> Any:
    return await do(await do(StarAuthor.objects, "get", pk=17), "delete", keep_parents=True)


@write
async def delete_with_composite_key(do: Do) -> Any:
    line = await do(OrderLine.objects, "get", pk=(2, 1))
    return await do(line, "delete"), await do(OrderLine.objects.filter(pk__gt=(8, 1)), "delete")


@write
async def delete_across_relations(do: Do) -> Any:
    return await do(Review.objects.filter(book__publisher__country="DE"), "delete")


@write
async def delete_overridden(do: Do) -> Any:
    return await do(await do(Document.objects, "get", pk=1), "delete")


@write
async def delete_a_queryset_past_the_override(do: Do) -> Any:
    return await do(Document.objects.filter(pk=1), "delete")


@write
async def delete_with_signals(do: Do) -> Any:
    return await do(Basket.objects.filter(pk__lt=3), "delete")


@write
async def delete_user(do: Do) -> Any:
    return await do(await do(User.objects, "get", pk=1), "delete")


@write
async def delete_using(do: Do) -> Any:
    return await do(books(pk__lt=4).using("other"), "delete")


@write
async def delete_one_to_one(do: Do) -> Any:
    return await do(await do(Profile.objects, "get", pk=1), "delete")


@write
@raises
async def delete_protected(do: Do) -> Any:
    await do(await do(Product.objects, "get", pk=1), "delete")


@write
@raises
async def delete_protected_queryset(do: Do) -> Any:
    await do(Product.objects.order_by(), "delete")


@write
@raises
async def delete_unsaved(do: Do) -> Any:
    await do(Book(title="unsaved"), "delete")


@write
@raises
async def delete_sliced(do: Do) -> Any:
    await do(books()[:3], "delete")


# --- Relations ------------------------------------------------------------------------------------


@write
async def add(do: Do) -> Any:
    book = await do(Book.objects, "get", pk=1)
    tag = await do(Tag.objects, "get", pk=5)
    await do(book.tags, "add", tag, 6, 1)
    return await do.rows(book.tags.all())


@write
async def add_reverse(do: Do) -> Any:
    tag = await do(Tag.objects, "get", pk=6)
    await do(tag.books, "add", 1, 2, 3)
    return await do.rows(tag.books.order_by("pk"))


@write
async def add_forgets_the_prefetched(do: Do) -> Any:
    book = await do(Book.objects.prefetch_related("tags"), "get", pk=1)
    await do(book.tags, "add", 6)
    return book, await do.rows(book.tags.all())


@write
async def add_through_with_defaults(do: Do) -> Any:
    book = await do(Book.objects, "get", pk=28)
    await do(book.authors, "add", 11, 12, through_defaults={"role": "cover", "position": 9})
    return await do.rows(book.authors.order_by("pk"))


@write
async def add_symmetrical(do: Do) -> Any:
    person = await do(Person.objects, "get", pk=4)
    await do(person.friends, "add", 2, 3)
    return await do.rows(person.friends.all())


@write
async def add_asymmetrical(do: Do) -> Any:
    author = await do(Author.objects, "get", pk=11)
    await do(author.influenced, "add", 18)
    await do(author.influences, "add", 17)
    return await do.rows(author.influences.all()), await do.rows(author.influenced.all())


@write
async def add_to_one_to_many(do: Do) -> Any:
    publisher = await do(Publisher.objects, "get", pk=5)
    found = await do.rows(books(pk__lt=4))
    await do(publisher.books, "add", *found)
    return found, await do.rows(publisher.books.order_by("pk"))


@write
async def add_unsaved_to_one_to_many(do: Do) -> Any:
    publisher = await do(Publisher.objects, "get", pk=5)
    await do(publisher.books, "add", Book(**new_book()), bulk=False)
    return await do.rows(publisher.books.order_by("pk"))


@write
async def add_generic(do: Do) -> Any:
    book = await do(Book.objects, "get", pk=3)
    await do(book.notes, "add", await do(Note.objects, "get", pk=1))
    return await do.rows(book.notes.order_by("pk"))


@write
async def add_with_signals(do: Do) -> Any:
    basket = await do(Basket.objects, "get", pk=3)
    await do(basket.tags, "add", 1, 2)
    tag = await do(Tag.objects, "get", pk=4)
    await do(tag.basket_set, "add", 1)


@write
async def remove(do: Do) -> Any:
    book = await do(Book.objects, "get", pk=1)
    await do(book.tags, "remove", 2, 6)
    return await do.rows(book.tags.all())


@write
async def remove_symmetrical(do: Do) -> Any:
    person = await do(Person.objects, "get", pk=2)
    await do(person.friends, "remove", 1)


@write
async def remove_from_one_to_many(do: Do) -> Any:
    publisher = await do(Publisher.objects, "get", pk=1)
    book = await do(publisher.books.order_by("pk"), "first")
    await do(publisher.books, "remove", book)
    return book


@write
async def remove_generic(do: Do) -> Any:
    book = await do(Book.objects, "get", pk=1)
    note = await do(book.notes.order_by("pk"), "first")
    await do(book.notes, "remove", note)
    return note


@write
async def remove_with_signals(do: Do) -> Any:
    await do((await do(Basket.objects, "get", pk=1)).tags, "remove", 1, 6)


@write
async def clear(do: Do) -> Any:
    book = await do(Book.objects, "get", pk=1)
    await do(book.tags, "clear")
    await do(book.related, "clear")
    await do(book.notes, "clear")
    return book


@write
async def clear_one_to_many(do: Do) -> Any:
    await do((await do(Publisher.objects, "get", pk=2)).books, "clear")


@write
async def clear_without_bulk(do: Do) -> Any:
    await do((await do(Publisher.objects, "get", pk=2)).books, "clear", bulk=False)


@write
async def clear_with_signals(do: Do) -> Any:
    await do((await do(Basket.objects, "get", pk=1)).tags, "clear")
    await do((await do(Tag.objects, "get", pk=2)).basket_set, "clear")


@write
async def set_(do: Do) -> Any:
    book = await do(Book.objects, "get", pk=1)
    await do(book.tags, "set", [1, 6])
    return await do.rows(book.tags.all())


@write
async def set_clearing(do: Do) -> Any:
    book = await do(Book.objects, "get", pk=1)
    await do(book.tags, "set", [2, 6], clear=True)
    return await do.rows(book.tags.all())


@write
async def set_instances(do: Do) -> Any:
    book = await do(Book.objects, "get", pk=1)
    await do(book.tags, "set", Tag.objects.filter(weight__gt=0))
    return await do.rows(book.tags.all())


@write
async def set_one_to_many(do: Do) -> Any:
    publisher = await do(Publisher.objects, "get", pk=2)
    await do(publisher.books, "set", await do.rows(books(pk__in=[1, 2, 9])))
    return await do.rows(publisher.books.order_by("pk"))


@write
async def set_generic(do: Do) -> Any:
    author = await do(Author.objects, "get", pk=11)
    await do(author.notes, "set", await do.rows(Note.objects.filter(pk__in=[1, 4])))
    return await do.rows(author.notes.order_by("pk"))


@write
async def set_through(do: Do) -> Any:
    book = await do(Book.objects, "get", pk=3)
    await do(book.authors, "set", [11, 18], through_defaults={"role": "set"})


@write
async def set_with_signals(do: Do) -> Any:
    await do((await do(Basket.objects, "get", pk=1)).tags, "set", [2, 3])


@write
async def set_groups(do: Do) -> Any:
    user = await do(User.objects, "get", pk=2)
    await do(user.groups, "set", [await do(Group.objects, "get", name="staff")])
    return await do.rows(user.groups.all())


@write
async def set_using(do: Do) -> Any:
    book = await do(Book.objects.using("other"), "get", pk=1)
    await do(book.tags, "set", [1, 6])
    return await do.rows(book.tags.all())


@write
@raises
async def add_an_unsaved_object(do: Do) -> Any:
    await do((await do(Book.objects, "get", pk=1)).tags, "add", Tag(name="unsaved"))


@write
@raises
async def add_of_another_alias(do: Do) -> Any:
    book = await do(Book.objects, "get", pk=1)
    await do(book.tags, "add", await do(Tag.objects.using("other"), "get", pk=1))


# --- Whole functions ------------------------------------------------------------------------------


def order_something() -> Any:
    """What a service function looks like: several models, a transaction, savepoints, on_commit."""
    with transaction.atomic():
        customer = Customer.objects.select_for_update().get(pk=2)
        order = Order.objects.create(customer=customer, placed=moment(1), status=Order.Status.PAID)
        for number, product in enumerate(Product.objects.filter(stock__gt=2).order_by("pk"), 1):
            try:
                with transaction.atomic():
                    Product.objects.filter(pk=product.pk).update(stock=F("stock") - 4)
                    OrderLine.objects.create(
                        order=order, number=number, product=product, price=product.price
                    )
            except Exception as error:
                AuditEntry.objects.create(text=type(error).__name__)
        transaction.on_commit(lambda: AuditEntry.objects.create(text="committed"))
        AuditEntry.objects.create(text="before commit")
    return order, list(order.lines.order_by("number").values_list("product_id", flat=True))


@write
async def run_a_transaction(do: Do) -> Any:
    return await do.run(order_something)


@write
@raises
async def run_a_transaction_that_fails(do: Do) -> Any:
    def failing() -> None:
        with transaction.atomic():
            order_something()
            raise LookupError("all of it is undone")

    await do.run(failing)


@write
@unchanged
async def run_a_rollback(do: Do) -> Any:
    def undone() -> Any:
        with transaction.atomic():
            Tag.objects.all().delete()
            transaction.set_rollback(True)
        return Tag.objects.count()

    return await do.run(undone)


@write
async def run_on_two_aliases(do: Do) -> Any:
    def both() -> Any:
        with transaction.atomic(), transaction.atomic(using="other"):
            for tag in Tag.objects.using("other").filter(weight__gt=0):
                tag.weight += 1
                tag.save()
                Tag.objects.filter(pk=tag.pk).update(weight=-1)
        return list(Tag.objects.all()), list(Tag.objects.using("other"))

    return await do.run(both)


@write
async def run_generic_relations_with_a_cold_cache(do: Do) -> Any:
    # Outside native code, merely naming `book.notes` asks for its content type, synchronously.
    def annotated() -> Any:
        ContentType.objects.clear_cache()
        book = Book.objects.get(pk=2)
        book.notes.create(text="new")
        return list(book.notes.order_by("pk"))

    return await do.run(annotated)
