"""The table of querysets, by topic, whose native result must equal the synchronous one.

Each shape is a function, so that every evaluation starts from a fresh queryset. All are ordered,
and no aggregate depends on the plan that the server happens to choose.
"""

import datetime as dt
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from django.contrib.auth.models import Group, Permission, User
from django.contrib.contenttypes.models import ContentType
from django.contrib.contenttypes.prefetch import GenericPrefetch
from django.contrib.postgres.aggregates import (
    ArrayAgg,
    BoolAnd,
    BoolOr,
    Corr,
    JSONBAgg,
    RegrSlope,
)
from django.contrib.postgres.expressions import ArraySubquery
from django.contrib.postgres.search import (
    SearchHeadline,
    SearchQuery,
    SearchRank,
    SearchVector,
    TrigramSimilarity,
)
from django.db.backends.postgresql.psycopg_any import (
    DateRange,
    DateTimeTZRange,
    NumericRange,
)
from django.db.models import (
    Avg,
    BooleanField,
    Case,
    CharField,
    Count,
    DecimalField,
    DurationField,
    Exists,
    ExpressionWrapper,
    F,
    FilteredRelation,
    FloatField,
    IntegerField,
    JSONField,
    Max,
    Min,
    OuterRef,
    Prefetch,
    Q,
    StdDev,
    Subquery,
    Sum,
    Value,
    Variance,
    When,
    Window,
)
from django.db.models.fields.json import KT
from django.db.models.functions import (
    MD5,
    Abs,
    Cast,
    Ceil,
    Coalesce,
    Concat,
    DenseRank,
    Extract,
    ExtractIsoWeekDay,
    ExtractYear,
    FirstValue,
    Greatest,
    JSONObject,
    Lag,
    Lead,
    Left,
    Length,
    Lower,
    LPad,
    Mod,
    NthValue,
    Ntile,
    NullIf,
    PercentRank,
    Power,
    Rank,
    Replace,
    Round,
    RowNumber,
    StrIndex,
    Substr,
    Trim,
    TruncDate,
    TruncMonth,
    TruncQuarter,
    TruncTime,
    Upper,
)

from tests.project.shop.models import (
    Article,
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

Shape = Callable[[], Any]
SHAPES: dict[str, Shape] = {}
# Shapes that are to find nothing, or to fail; every other one must find something, or it would
# prove nothing.
EMPTY: set[str] = set()
RAISES: set[str] = set()


def topic(
    name: str,
    shapes: dict[str, Shape],
    *,
    empty: tuple[str, ...] = (),
    raises: tuple[str, ...] = (),
) -> None:
    for label, shape in shapes.items():
        assert f"{name}: {label}" not in SHAPES
        SHAPES[f"{name}: {label}"] = shape
    EMPTY.update(f"{name}: {label}" for label in empty)
    RAISES.update(f"{name}: {label}" for label in raises)


def rounded(statistic: Any) -> Cast:
    """Without the last digits, which depend on the order in which the server meets the rows."""
    return Cast(statistic, DecimalField(max_digits=12, decimal_places=6))


topic(
    "models",
    {
        model._meta.label: lambda model=model: model._base_manager.order_by("pk")
        for model in [
            Article,
            Author,
            Authorship,
            Basket,
            Book,
            Category,
            ContentType,
            Country,
            Customer,
            Document,
            Event,
            Group,
            Note,
            Order,
            OrderLine,
            Permission,
            Person,
            PrintedBook,
            Product,
            Profile,
            Publisher,
            Review,
            StarAuthor,
            Tag,
            Ticket,
            User,
        ]
    }
    | {"shop.AuditEntry": lambda: AuditEntry.objects.all()},
    empty=("shop.AuditEntry",),
)

topic(
    "lookups",
    {
        "exact": lambda: books(pk=3),
        "exact none": lambda: books(rating=None),
        "iexact": lambda: books(title__iexact="SEA 4"),
        "contains": lambda: books(title__contains="Sea"),
        "contains percent": lambda: books(title__contains="0% P"),
        "contains underscore": lambda: books(title__contains="r_s"),
        "contains backslash": lambda: books(title__contains="\\"),
        "icontains umlaut": lambda: books(title__icontains="öL"),
        "in": lambda: books(pk__in=[1, 5, 9, 1000]),
        "in empty": lambda: books(pk__in=[]),
        "in queryset": lambda: books(publisher__in=Publisher.objects.filter(country="DE")),
        "gt": lambda: books(price__gt=Decimal("30.5")),
        "gte": lambda: books(pages__gte=300),
        "lt": lambda: books(rating__lt=1.5),
        "lte": lambda: books(sold__lte=5),
        "startswith": lambda: books(title__startswith="Qu"),
        "istartswith": lambda: books(title__istartswith="qu"),
        "endswith": lambda: books(title__endswith="4"),
        "iendswith": lambda: books(slug__iendswith="-7"),
        "range": lambda: books(published__range=(dt.date(2016, 1, 1), dt.date(2018, 12, 31))),
        "isnull": lambda: books(audio_length__isnull=True),
        "isnull false": lambda: books(publisher__isnull=False),
        "regex": lambda: books(title__regex=r"^[SN].*[0-5]$"),
        "iregex": lambda: books(title__iregex=r"^sea"),
        "date": lambda: books(created__date=dt.date(2024, 2, 1)),
        "year": lambda: books(published__year=2017),
        "year gte": lambda: books(published__year__gte=2020),
        "iso_year": lambda: books(published__iso_year=2018),
        "month": lambda: books(published__month=5),
        "day": lambda: books(published__day__in=[3, 4]),
        "week": lambda: books(published__week__lt=20),
        "week_day": lambda: books(published__week_day=2),
        "iso_week_day": lambda: books(created__iso_week_day__gt=4),
        "quarter": lambda: books(published__quarter=2),
        "time": lambda: books(created__time__gt=dt.time(15, 0)),
        "hour in zone": lambda: books(created__hour=1 + 4),
        "minute": lambda: books(created__minute=30),
        "second": lambda: books(created__second=15),
        "duration": lambda: books(audio_length__gt=dt.timedelta(hours=10)),
        "boolean": lambda: books(in_print=True),
        "enum": lambda: books(language=Book.Language.GERMAN),
        "uuid": lambda: Event.objects.filter(pk=uid(2)),
        "uuid in": lambda: Event.objects.filter(pk__in=[uid(1), str(uid(3))]).order_by("pk"),
        "ip": lambda: Event.objects.filter(address="192.168.0.1"),
        "ip startswith": lambda: Event.objects.filter(address__startswith="2001:"),
        "binary": lambda: Event.objects.filter(poster=b"\x00\xffPNG'\\"),
        "time of day": lambda: Event.objects.filter(doors__gte=dt.time(19)).order_by("pk"),
        "negative duration": lambda: Event.objects.filter(lasts__lt=dt.timedelta(0)),
        "unaccent": lambda: Author.objects.filter(name__unaccent="Emile"),
        "trigram_similar": lambda: books(title__trigram_similar="Nigth 4"),
        "generated field": lambda: books(gross__gt=40),
        "file": lambda: books(sample="samples/5.pdf"),
        "quote": lambda: books(title__contains="'"),
        "across relations": lambda: books(publisher__country__name__startswith="Ger"),
        "across to many": lambda: books(authors__name="Ada").distinct(),
        "to many twice": lambda: books(tags__name="crime").filter(tags__weight=0),
        "reverse": lambda: Publisher.objects.filter(books__price__gt=35).distinct().order_by("pk"),
        "instance": lambda: books(publisher=Publisher(pk=1)),
        "transform of transform": lambda: books(created__date__year=2025),
    },
    empty=("in empty",),
)

topic(
    "q and exclude",
    {
        "or": lambda: books(Q(pk=1) | Q(title__startswith="N")),
        "and not": lambda: books(Q(in_print=True) & ~Q(language="de")),
        "xor": lambda: books(Q(in_print=True) ^ Q(pages__gt=250)),
        "nested": lambda: books(
            Q(Q(pk__lt=5) | Q(pk__gt=25)) & Q(Q(rating=None) | Q(rating__gt=1))
        ),
        "exclude": lambda: books().exclude(in_print=True),
        "exclude null": lambda: books().exclude(publisher__country="DE"),
        "exclude to many": lambda: books().exclude(tags__name="classic"),
        "exclude two conditions": lambda: books().exclude(tags__name="crime", language="en"),
        "empty q": lambda: books(Q()),
        "negated none": lambda: books(~Q(pk__in=[])),
        "none": lambda: Book.objects.none(),
        "f": lambda: books(sold=F("pk")),
        "f arithmetic": lambda: books(pages__gt=F("pk") * 20 + F("price")),
        "f across": lambda: books(published__gt=F("publisher__founded")),
        "f date arithmetic": lambda: books(changed__gt=F("created") + dt.timedelta(days=2)),
        "f bits": lambda: books(pk__gt=3).annotate(bits=F("pages").bitand(12)).filter(bits=4),
        "expression": lambda: books(Exists(Review.objects.filter(book=OuterRef("pk"), stars=5))),
        "chained": lambda: books(pk__gt=3).exclude(pk=7).filter(pk__lt=12).exclude(pages=0),
    },
    empty=("none",),
)

topic(
    "annotations",
    {
        "count": lambda: books().annotate(n=Count("reviews")),
        "count distinct": lambda: books().annotate(
            r=Count("reviews", distinct=True), t=Count("tags", distinct=True)
        ),
        "count filter": lambda: books().annotate(
            good=Count("reviews", filter=Q(reviews__stars__gt=3))
        ),
        "sum": lambda: Order.objects.annotate(
            total=Sum(F("lines__quantity") * F("lines__price"))
        ).order_by("pk"),
        "sum default": lambda: Order.objects.annotate(n=Sum("lines__quantity", default=0)).order_by(
            "pk"
        ),
        "avg": lambda: Publisher.objects.annotate(
            price=Avg("books__price"), rating=Avg("books__rating")
        ).order_by("pk"),
        "min max": lambda: Publisher.objects.annotate(
            first=Min("books__published"), last=Max("books__created")
        ).order_by("pk"),
        "stddev": lambda: Publisher.objects.annotate(
            s=StdDev("books__pages"), v=Variance("books__pages", sample=True)
        ).order_by("pk"),
        "having": lambda: (
            Publisher.objects.annotate(n=Count("books")).filter(n__gt=3).order_by("pk")
        ),
        "group by": lambda: (
            Book.objects.values("language", "in_print")
            .annotate(n=Count("pk"), price=Sum("price"))
            .order_by("language", "in_print")
        ),
        "alias": lambda: books().alias(n=Count("reviews")).filter(n=3),
        "value": lambda: books().annotate(
            one=Value(1), text=Value("ü"), nothing=Value(None, CharField())
        ),
        "decimal expression": lambda: books().annotate(
            net=ExpressionWrapper(F("price") / Decimal("1.2"), output_field=DecimalField())
        ),
        "duration expression": lambda: books(changed__isnull=False).annotate(
            age=ExpressionWrapper(F("changed") - F("created"), output_field=DurationField())
        ),
        "f of relation": lambda: books().annotate(country=F("publisher__country__name")),
        "concat": lambda: books().annotate(
            full=Concat("title", Value(" ("), "language", Value(")"))
        ),
        "coalesce": lambda: books().annotate(r=Coalesce("rating", Value(-1.0))),
        "greatest": lambda: books().annotate(
            g=Greatest("pages", "sold", output_field=IntegerField())
        ),
        "nullif": lambda: books().annotate(n=NullIf("pages", Value(0))),
        "cast": lambda: books().annotate(
            a=Cast("price", CharField()),
            b=Cast("pages", FloatField()),
            c=Cast("rating", IntegerField()),
        ),
        "text functions": lambda: books().annotate(
            a=Lower("title"),
            b=Upper("title"),
            c=Length("title"),
            d=Left("title", 3),
            e=Substr("title", 2, 2),
            f=Replace("title", Value("e"), Value("3")),
            g=MD5("title"),
            h=LPad("slug", 12, Value("*")),
            i=StrIndex("title", Value("a")),
            j=Trim("title"),
        ),
        "math functions": lambda: books().annotate(
            a=Abs(F("pages") - 200),
            b=Ceil("price"),
            c=Round("rating", 1),
            d=Mod("pages", 7),
            e=Power("pages", 2),
        ),
        "date functions": lambda: books().annotate(
            a=TruncMonth("created"),
            b=TruncDate("created"),
            c=TruncTime("created"),
            d=TruncQuarter("published"),
            e=Extract("created", "epoch"),
            f=ExtractYear("published"),
            g=ExtractIsoWeekDay("created"),
        ),
        "trunc in another zone": lambda: books().annotate(
            day=TruncDate("created", tzinfo=dt.timezone(dt.timedelta(hours=13)))
        ),
        "json object": lambda: books().annotate(j=JSONObject(t="title", p="pages", r="rating")),
        "filtered relation": lambda: (
            Publisher.objects.annotate(
                german=FilteredRelation("books", condition=Q(books__language="de"))
            )
            .annotate(n=Count("german"))
            .order_by("pk")
        ),
        "array agg": lambda: books().annotate(
            names=ArrayAgg(
                "tags__name", distinct=True, filter=Q(tags__name__isnull=False), default=Value([])
            )
        ),
        "json agg": lambda: Publisher.objects.annotate(
            p=JSONBAgg("books__pages", distinct=True)
        ).order_by("pk"),
        "bool agg": lambda: Publisher.objects.annotate(
            a=BoolAnd("books__in_print"), o=BoolOr("books__in_print")
        ).order_by("pk"),
        "statistics": lambda: (
            Book.objects.values("language")
            .annotate(c=rounded(Corr("price", "pages")), s=rounded(RegrSlope("price", "pages")))
            .order_by("language")
        ),
        "trigram": lambda: books().annotate(s=TrigramSimilarity("title", "night 7")),
        "on inherited": lambda: Author.objects.annotate(
            n=Count("books"), m=F("mentor__name")
        ).order_by("pk"),
        "annotation in order": lambda: Book.objects.annotate(n=Count("tags")).order_by("-n", "pk"),
        "annotation over annotation": lambda: (
            books()
            .annotate(twice=F("pages") * 2)
            .annotate(four=F("twice") * 2)
            .filter(four__gt=1000)
        ),
    },
)

topic(
    "case",
    {
        "simple": lambda: books().annotate(
            size=Case(
                When(pages__lt=100, then=Value("thin")),
                When(pages__lt=300, then=Value("medium")),
                default=Value("thick"),
            )
        ),
        "without default": lambda: books().annotate(
            cheap=Case(When(price__lt=10, then=Value(True)), output_field=BooleanField())
        ),
        "then f": lambda: books().annotate(
            shown=Case(When(rating=None, then=F("slug")), default=F("title"))
        ),
        "in filter": lambda: books(
            pages__gt=Case(When(language="de", then=Value(250)), default=Value(100))
        ),
        "in order": lambda: Book.objects.order_by(
            Case(When(language="fr", then=0), When(language="de", then=1), default=2), "-pk"
        ),
        "in aggregate": lambda: (
            Book.objects.values("publisher")
            .annotate(n=Sum(Case(When(in_print=True, then=1), default=0)))
            .order_by(F("publisher").asc(nulls_first=True))
        ),
    },
)

newest_review = Review.objects.filter(book=OuterRef("pk")).order_by("-written")
topic(
    "subqueries",
    {
        "scalar": lambda: books().annotate(stars=Subquery(newest_review.values("stars")[:1])),
        "with output field": lambda: books().annotate(
            n=Subquery(
                Review.objects.filter(book=OuterRef("pk"))
                .order_by()
                .values("book")
                .annotate(n=Count("pk"))
                .values("n"),
                output_field=IntegerField(),
            )
        ),
        "exists": lambda: books().annotate(has=Exists(newest_review)),
        "not exists": lambda: books(~Exists(newest_review)),
        "in values": lambda: books(pk__in=Review.objects.filter(stars=5).values("book")),
        "nested outer ref": lambda: Publisher.objects.filter(
            Exists(
                Book.objects.filter(publisher=OuterRef("pk")).filter(
                    Exists(
                        Review.objects.filter(book=OuterRef("pk"), stars=OuterRef(OuterRef("pk")))
                    )
                )
            )
        ).order_by("pk"),
        "array": lambda: books().annotate(
            stars=ArraySubquery(newest_review.values("stars")),
            rows=ArraySubquery(newest_review.values(j=JSONObject(s="stars", at="written"))),
        ),
        "in order": lambda: Book.objects.order_by(
            Subquery(newest_review.values("stars")[:1]).desc(nulls_last=True), "pk"
        ),
        "sliced in": lambda: books(pk__in=Book.objects.order_by("-pages").values("pk")[:5]),
        "of union": lambda: books(
            pk__in=Book.objects.filter(pk=1)
            .values("pk")
            .union(Book.objects.filter(pk=2).values("pk"))
        ),
    },
)

by_language: dict[str, Any] = {"partition_by": "language", "order_by": ["price", "pk"]}
topic(
    "windows",
    {
        "row number": lambda: books().annotate(n=Window(RowNumber(), **by_language)),
        "rank": lambda: books().annotate(
            a=Window(Rank(), order_by=F("language").asc()),
            b=Window(DenseRank(), order_by="language"),
            c=Window(PercentRank(), order_by="language"),
        ),
        "lag lead": lambda: books().annotate(
            before=Window(Lag("title"), **by_language),
            after=Window(Lead("price", 2, Decimal("0")), **by_language),
        ),
        "first nth ntile": lambda: books().annotate(
            a=Window(FirstValue("pk"), **by_language),
            b=Window(NthValue("pk", 2), **by_language),
            c=Window(Ntile(3), **by_language),
        ),
        "running sum": lambda: books().annotate(s=Window(Sum("price"), **by_language)),
        "filtered": lambda: books().annotate(n=Window(RowNumber(), **by_language)).filter(n=1),
        "values": lambda: (
            books()
            .annotate(a=Window(Avg("pages"), partition_by=["language", "in_print"]))
            .values("pk", "a")
        ),
    },
)

topic(
    "values",
    {
        "all": lambda: books().values(),
        "some": lambda: books().values("pk", "title", "price"),
        "across": lambda: books().values("title", "publisher__name", "publisher__country__name"),
        "to many": lambda: Book.objects.values("pk", "tags__name").order_by("pk", "tags__name"),
        "expressions": lambda: books().values("pk", upper=Upper("title"), twice=F("pages") * 2),
        "transform": lambda: books().values("pk", "published__year", "created__date"),
        "annotated": lambda: books().annotate(n=Count("reviews")).values("title", "n"),
        "json key": lambda: books().values("pk", "data__shelf", "data__dims__w", "data__missing"),
        "after annotate group": lambda: (
            Review.objects.values("book__language")
            .annotate(avg=Avg("stars"))
            .order_by("book__language")
        ),
        "list": lambda: books().values_list("pk", "title"),
        "list all": lambda: books().values_list(),
        "list flat": lambda: books().values_list("title", flat=True),
        "list flat pk": lambda: books().values_list("pk", flat=True),
        "list flat decimal": lambda: books().values_list("price", flat=True),
        "list named": lambda: books().values_list("pk", "publisher__name", "created", named=True),
        "list expressions": lambda: books().values_list("pk", Lower("title"), F("price") * 2),
        "list distinct": lambda: (
            Book.objects.order_by("language").values_list("language", flat=True).distinct()
        ),
        "composite key": lambda: OrderLine.objects.order_by("pk").values("pk", "quantity"),
        "composite key list": lambda: OrderLine.objects.order_by("pk").values_list("pk", flat=True),
        "rarer types": lambda: Event.objects.order_by("pk").values(),
        "rarer types list": lambda: Event.objects.order_by("pk").values_list(),
        "foreign key": lambda: books().values_list("publisher", "publisher_id"),
        "inherited": lambda: StarAuthor.objects.order_by("pk").values("pk", "name", "stars"),
        "reverse one to one": lambda: Customer.objects.order_by("pk").values(
            "name", "profile__bio"
        ),
        "generic relation": lambda: (
            books(pk__lt=5).order_by("pk", "notes").values("pk", "notes__text")
        ),
        "without duplicates": lambda: (
            Book.objects.values("language").distinct().order_by("language")
        ),
    },
)

topic(
    "dates",
    {
        "years": lambda: Book.objects.dates("published", "year"),
        "months": lambda: Book.objects.dates("published", "month", order="DESC"),
        "weeks": lambda: Book.objects.filter(pk__lt=9).dates("published", "week"),
        "days": lambda: Book.objects.dates("published", "day"),
        "datetimes month": lambda: Book.objects.datetimes("created", "month"),
        "datetimes day": lambda: Order.objects.order_by().datetimes("placed", "day", order="DESC"),
        "datetimes hour": lambda: Book.objects.datetimes("created", "hour"),
        "datetimes in zone": lambda: Book.objects.datetimes("created", "day", tzinfo=dt.UTC),
        "across": lambda: Review.objects.order_by().dates("book__published", "year"),
    },
)

topic(
    "order, distinct, slices",
    {
        "nulls first": lambda: Book.objects.order_by(F("rating").asc(nulls_first=True), "pk"),
        "nulls last": lambda: Book.objects.order_by(F("published").desc(nulls_last=True), "-pk"),
        "expression": lambda: Book.objects.order_by(Length("title").desc(), Lower("title"), "pk"),
        "relation": lambda: Book.objects.order_by("publisher__name", "pk"),
        "default ordering": lambda: Person.objects.all(),
        "default ordering of relation": lambda: Review.objects.order_by("book", "_order"),
        "relation that is ordered": lambda: Author.objects.order_by("-mentor", "pk"),
        "relation that is ordered, of a relation": lambda: Book.objects.order_by(
            "product__book", F("publisher__country").desc(nulls_first=True), "pk"
        ),
        "relation without an order": lambda: Book.objects.order_by("-publisher", "pk"),
        "expression of an annotation": lambda: Book.objects.annotate(n=F("pages") + 1).order_by(
            F("n").desc(), "pk"
        ),
        "order with respect to": lambda: Review.objects.filter(book=4),
        "reverse": lambda: books().reverse(),
        "reverse default": lambda: Tag.objects.reverse(),
        "unordered": lambda: Tag.objects.order_by().filter(pk=2),
        "distinct": lambda: books(tags__weight__gte=0).distinct(),
        "distinct on": lambda: Book.objects.order_by("language", "-pages", "pk").distinct(
            "language"
        ),
        "distinct on relation": lambda: Book.objects.order_by("publisher__name", "pk").distinct(
            "publisher__name"
        ),
        "slice": lambda: books()[3:9],
        "slice head": lambda: books()[:4],
        "slice tail": lambda: books()[25:],
        "slice of slice": lambda: books()[2:20][3:5],
        "slice with related": lambda: books().select_related("publisher")[:3],
        "slice beyond": lambda: books()[100:],
        "slice empty": lambda: books()[5:5],
    },
    empty=("slice beyond", "slice empty"),
)

topic(
    "combined",
    {
        "union": lambda: books(pk__lt=4).order_by().union(Book.objects.filter(pk=8)).order_by("pk"),
        "union all": lambda: (
            Tag.objects.order_by()
            .union(Tag.objects.filter(pk=1).order_by(), all=True)
            .order_by("name")
        ),
        "intersection": lambda: (
            Book.objects.filter(in_print=True)
            .intersection(Book.objects.filter(language="de"))
            .order_by("pk")
        ),
        "difference": lambda: Book.objects.difference(Book.objects.filter(in_print=True)).order_by(
            "pk"
        ),
        "of values": lambda: (
            Author.objects.order_by()
            .values_list("name")
            .union(Tag.objects.order_by().values_list("name"))
            .order_by("name")
        ),
        "of three, sliced": lambda: (
            Book.objects.filter(pk=1)
            .union(Book.objects.filter(pk=2), Book.objects.filter(pk__gt=27))
            .order_by("-pk")[1:4]
        ),
        "annotated": lambda: (
            Book.objects.annotate(k=Value("a"))
            .filter(pk=1)
            .union(Book.objects.annotate(k=Value("b")).filter(pk=2))
            .order_by("k")
        ),
        "or": lambda: books(pk__lt=3) | books(pk__gt=28),
        "and": lambda: books(pk__lt=9) & books(in_print=True),
        "xor": lambda: books(pk__lt=9) ^ books(in_print=True),
        "values of one, ordered by another column": lambda: (
            Tag.objects.filter(pk__lt=3)
            .union(Tag.objects.filter(pk=3))
            .order_by("name")
            .values_list("pk", flat=True)
        ),
        "of combined ones": lambda: (
            Book.objects.filter(pk=1)
            .union(Book.objects.filter(pk=2).difference(Book.objects.filter(pages__lt=0)))
            .order_by("pk")
        ),
        "of ordered slices": lambda: (
            Book.objects.order_by("-pk")[:2].union(Book.objects.order_by("pk")[:2], all=True)
        ).order_by("pk"),
        "with a relation": lambda: (
            Book.objects.filter(pk=1)
            .select_related("publisher")
            .union(Book.objects.filter(pk=2).select_related("publisher"))
            .order_by("pk")
        ),
        "with none": lambda: Book.objects.none().union(Book.objects.filter(pk=1)),
    },
)

topic(
    "raw and extra",
    {
        "raw": lambda: Book.objects.raw("SELECT * FROM shop_book ORDER BY id"),
        "raw params": lambda: Book.objects.raw(
            "SELECT * FROM shop_book WHERE pages > %s AND language = %s ORDER BY id", [100, "de"]
        ),
        "raw named params": lambda: Book.objects.raw(
            "SELECT * FROM shop_book WHERE id < %(top)s ORDER BY id", {"top": 4}
        ),
        "raw deferred": lambda: Book.objects.raw("SELECT id, title FROM shop_book ORDER BY id"),
        "raw annotated": lambda: Book.objects.raw(
            "SELECT id, title, pages * 2 AS twice FROM shop_book ORDER BY id"
        ),
        "raw translations": lambda: Book.objects.raw(
            "SELECT id, slug AS name FROM shop_book ORDER BY id", translations={"name": "title"}
        ),
        "raw prefetch": lambda: Book.objects.raw(
            "SELECT * FROM shop_book ORDER BY id"
        ).prefetch_related("tags", "publisher__country"),
        "raw using": lambda: Book.objects.raw("SELECT * FROM shop_book ORDER BY id").using("other"),
        "extra select": lambda: books().extra(select={"long": "pages > %s"}, select_params=[200]),
        "extra where": lambda: books().extra(where=["pages %% 2 = %s"], params=[1]),
        "extra order": lambda: Book.objects.extra(order_by=["-shop_book.pages", "id"]),
        "extra values": lambda: books().extra(select={"x": "pages + 1"}).values("pk", "x"),
        "raw expression": lambda: books().annotate(
            n=Subquery(
                Review.objects.filter(book=OuterRef("pk"))
                .order_by()
                .values("book")
                .annotate(n=Sum("stars"))
                .values("n")
            )
        ),
    },
)

topic(
    "defer and only",
    {
        "defer": lambda: books().defer("title", "data"),
        "only": lambda: books().only("title"),
        "only then defer": lambda: books().only("title", "pages").defer("pages"),
        "defer none": lambda: books().defer("title").defer(None),
        "only across": lambda: books().select_related("publisher").only("title", "publisher__name"),
        "defer across": lambda: (
            books().select_related("publisher__country").defer("publisher__founded", "data")
        ),
        "inherited": lambda: Author.objects.order_by("pk").only("pen_name"),
        "inherited defer": lambda: StarAuthor.objects.order_by("pk").defer("name", "email"),
        "annotated": lambda: books().annotate(n=Count("tags")).only("title"),
    },
)

topic(
    "select_related",
    {
        "one": lambda: books().select_related("publisher"),
        "nested": lambda: books().select_related("publisher__country"),
        "two": lambda: Review.objects.select_related("book__publisher", "customer__user").order_by(
            "pk"
        ),
        "everything": lambda: Review.objects.select_related().order_by("pk"),
        "reverse one to one": lambda: Customer.objects.select_related("profile").order_by("pk"),
        "reverse one to one nested": lambda: Customer.objects.select_related(
            "profile__country", "user"
        ).order_by("pk"),
        "reverse of one to one": lambda: books().select_related("product__category__parent"),
        "to itself": lambda: Category.objects.select_related("parent__parent").order_by("pk"),
        "parent link": lambda: Author.objects.select_related("person_ptr", "mentor").order_by("pk"),
        "child of person": lambda: Person.objects.select_related("author__starauthor").order_by(
            "pk"
        ),
        "child of author": lambda: Author.objects.select_related("starauthor").order_by("pk"),
        "composite key": lambda: OrderLine.objects.select_related(
            "order__customer", "product"
        ).order_by("pk"),
        "cleared": lambda: books().select_related("publisher").select_related(None),
        "filtered relation": lambda: (
            Book.objects.annotate(
                home=FilteredRelation("publisher", condition=Q(publisher__country="AT"))
            )
            .select_related("home")
            .order_by("pk")
        ),
        "user": lambda: User.objects.select_related("customer__profile").order_by("pk"),
        "to inherited": lambda: Event.objects.select_related("host__author").order_by("pk"),
        "through model": lambda: Authorship.objects.select_related(
            "book", "author__mentor"
        ).order_by("pk"),
    },
)

topic(
    "prefetch_related",
    {
        "to many": lambda: books().prefetch_related("tags"),
        "through": lambda: books().prefetch_related("authors"),
        "foreign key": lambda: books().prefetch_related("publisher"),
        "reverse foreign key": lambda: Publisher.objects.order_by("pk").prefetch_related("books"),
        "several": lambda: books().prefetch_related("tags", "authors", "reviews", "publisher"),
        "nested": lambda: Publisher.objects.order_by("pk").prefetch_related(
            "books__tags", "books__reviews__customer__user"
        ),
        "over select_related": lambda: (
            books()
            .select_related("publisher")
            .prefetch_related("publisher__country", "publisher__books")
        ),
        "select_related inside": lambda: books().prefetch_related(
            Prefetch("reviews", Review.objects.select_related("customer").order_by("pk"))
        ),
        "prefetch queryset": lambda: books().prefetch_related(
            Prefetch("tags", Tag.objects.filter(weight__gt=0))
        ),
        "prefetch to_attr": lambda: books().prefetch_related(
            Prefetch("reviews", Review.objects.filter(stars__gte=4).order_by("pk"), to_attr="good"),
            Prefetch("publisher", to_attr="house"),
        ),
        "prefetch to_attr nested": lambda: Publisher.objects.order_by("pk").prefetch_related(
            Prefetch(
                "books",
                books(in_print=True).prefetch_related(Prefetch("tags", to_attr="labels")),
                to_attr="printed",
            ),
            "printed__labels__books",
        ),
        "prefetch sliced": lambda: Publisher.objects.order_by("pk").prefetch_related(
            Prefetch("books", books()[:2], to_attr="top")
        ),
        "prefetch annotated": lambda: Publisher.objects.order_by("pk").prefetch_related(
            Prefetch("books", books().annotate(n=Count("tags")).only("title", "publisher"))
        ),
        "generic relation": lambda: books().prefetch_related("notes"),
        "generic foreign key": lambda: Note.objects.order_by("pk").prefetch_related("target"),
        "generic foreign key nested": lambda: (
            Note.objects.filter(pk__lt=4).order_by("pk").prefetch_related("target__tags")
        ),
        "generic prefetch": lambda: Note.objects.order_by("pk").prefetch_related(
            GenericPrefetch(
                "target",
                [
                    Book.objects.select_related("publisher"),
                    Author.objects.only("pen_name"),
                    Publisher.objects.all(),
                ],
            )
        ),
        "one to one": lambda: Profile.objects.order_by("pk").prefetch_related("customer"),
        "reverse one to one": lambda: Customer.objects.order_by("pk").prefetch_related("profile"),
        "to itself": lambda: Category.objects.order_by("pk").prefetch_related("children__children"),
        "symmetrical": lambda: Person.objects.prefetch_related("friends"),
        "asymmetrical": lambda: Author.objects.order_by("pk").prefetch_related(
            "influences", "influenced"
        ),
        "on inherited": lambda: Author.objects.order_by("pk").prefetch_related(
            "books__publisher", "friends", "notes", "events"
        ),
        "on proxy": lambda: PrintedBook.objects.prefetch_related("tags", "authors"),
        "composite key": lambda: Order.objects.prefetch_related("lines__product__category"),
        "on composite key": lambda: OrderLine.objects.order_by("pk").prefetch_related(
            "order", "product"
        ),
        "with slice": lambda: books().prefetch_related("tags")[:3],
        "cleared": lambda: books().prefetch_related("tags").prefetch_related(None),
        "user groups": lambda: User.objects.order_by("pk").prefetch_related(
            "groups__permissions", "user_permissions"
        ),
        "of nothing": lambda: books(pk=1000).prefetch_related("tags"),
        "using another alias": lambda: (
            books()
            .using("other")
            .prefetch_related("tags", Prefetch("reviews", Review.objects.using("other")))
        ),
    },
    empty=("of nothing",),
)

topic(
    "inheritance",
    {
        "child filter on parent": lambda: Author.objects.filter(born__year__gt=1950).order_by("pk"),
        "parent filter on child": lambda: Person.objects.filter(author__starauthor__stars__gt=0),
        "grandchild": lambda: StarAuthor.objects.order_by("-stars"),
        "default ordering inherited": lambda: Author.objects.all(),
        "proxy": lambda: PrintedBook.objects.all(),
        "proxy other manager": lambda: PrintedBook.everything.order_by("pk"),
        "proxy relation": lambda: PrintedBook.objects.filter(publisher__country="DE"),
        "abstract's manager": lambda: Book.objects.stamped_between(
            moment(100), moment(400)
        ).order_by("pk"),
        "abstract's queryset": lambda: Book.objects.filter(pk__lt=9).recent().order_by("-created"),
        "manager of queryset": lambda: Document.objects.alive().order_by("pk"),
    },
)

topic(
    "composite key",
    {
        "exact": lambda: OrderLine.objects.filter(pk=(2, 1)),
        "in": lambda: OrderLine.objects.filter(pk__in=[(1, 1), (2, 3), (9, 9)]).order_by("pk"),
        "greater": lambda: OrderLine.objects.filter(pk__gt=(5, 1)).order_by("pk"),
        "descending": lambda: OrderLine.objects.order_by("-pk"),
        "relation": lambda: OrderLine.objects.filter(order__customer=2).order_by("pk"),
        "reverse relation": lambda: Order.objects.filter(lines__quantity__gt=8).distinct(),
        "count of": lambda: Order.objects.annotate(n=Count("lines__number")).order_by("pk"),
    },
)

topic(
    "json",
    {
        "key": lambda: books(data__shelf="S1"),
        "path": lambda: books(data__dims__w__gt=20),
        "index": lambda: books(data__editions__0__year=2008),
        "null": lambda: books(data__sale=None),
        "boolean": lambda: books(data__sale=True),
        "isnull": lambda: books(data__shelf__isnull=True),
        "icontains": lambda: books(data__shelf__icontains="s2"),
        "has_key": lambda: books(data__has_key="dims"),
        "has_keys": lambda: books(data__has_keys=["dims", "shelf"]),
        "has_any_keys": lambda: books(extra__has_any_keys=["k", "x"]),
        "contains": lambda: books(data__contains={"shelf": "S3"}),
        "contained_by": lambda: books(data__contained_by={"a": 1}),
        "whole": lambda: books(extra={"k": "ü", "": 1}),
        "scalar": lambda: books(extra=0),
        "json null": lambda: books(extra=Value(None, JSONField())),
        "sql null": lambda: books(extra__isnull=True),
        "in": lambda: books(data__shelf__in=["S0", "S1"]),
        "key in order": lambda: Book.objects.order_by("data__dims__h", "pk"),
        "key text": lambda: books().annotate(shelf=KT("data__shelf"), w=KT("data__dims__w")),
        "key as value": lambda: books().annotate(first=F("data__editions__0")),
        "update expression": lambda: books().annotate(both=JSONObject(d="data", e="extra")),
    },
    empty=("json null",),
)

topic(
    "arrays",
    {
        "contains": lambda: books(keywords__contains=["sea"]),
        "contained_by": lambda: books(keywords__contained_by=["sea", "ship", "sun"]),
        "overlap": lambda: books(keywords__overlap=["ship", "NULL"]),
        "len": lambda: books(keywords__len=3),
        "index": lambda: books(keywords__0="night"),
        "slice": lambda: books(keywords__0_2=["night", "sea"]),
        "exact": lambda: books(keywords=["a,b", 'q"uote', "NULL"]),
        "empty": lambda: books(keywords=[]),
        "nested": lambda: books(matrix__0__1=2),
        "values": lambda: books().values_list("keywords", "keywords__0", "matrix"),
        "icontains": lambda: books(keywords__icontains="NIGHT"),
    },
)

topic(
    "ranges",
    {
        "contains": lambda: Event.objects.filter(seats__contains=60).order_by("pk"),
        "contains range": lambda: Event.objects.filter(
            seats__contains=NumericRange(60, 70)
        ).order_by("pk"),
        "contained_by": lambda: Event.objects.filter(
            seats__contained_by=NumericRange(0, 500)
        ).order_by("pk"),
        "overlap": lambda: Event.objects.filter(
            slot__overlap=DateTimeTZRange(moment(0), moment(2))
        ).order_by("pk"),
        "dates": lambda: Event.objects.filter(
            days__overlap=DateRange(dt.date(2024, 1, 3), dt.date(2024, 2, 1))
        ),
        "fully_lt": lambda: Event.objects.filter(seats__fully_lt=NumericRange(150, 160)).order_by(
            "pk"
        ),
        "startswith": lambda: Event.objects.filter(seats__startswith__gte=50).order_by("pk"),
        "isempty": lambda: Event.objects.filter(days__isempty=True),
        "upper_inf": lambda: Event.objects.filter(seats__upper_inf=True),
        "exact": lambda: Event.objects.filter(
            fee=NumericRange(Decimal("1.50"), Decimal("9.99"), "[]")
        ),
        "values": lambda: Event.objects.order_by("pk").values("slot", "days", "seats", "fee"),
        "field in range": lambda: books(pages__contained_by=NumericRange(100, 200)),
    },
)

topic(
    "hstore",
    {
        "key": lambda: Event.objects.filter(attributes__stage="big"),
        "contains": lambda: Event.objects.filter(attributes__contains={"stage": "small"}),
        "has_key": lambda: Event.objects.filter(attributes__has_key="quiet"),
        "keys": lambda: Event.objects.filter(attributes__keys__contains=["stage"]).order_by("pk"),
        "values": lambda: Event.objects.order_by("pk").values("attributes", "attributes__stage"),
        "key values": lambda: Event.objects.order_by("pk").values_list(
            "attributes__keys", "attributes__values"
        ),
    },
)

topic(
    "full text",
    {
        "search lookup": lambda: Article.objects.filter(body__search="run loop").order_by("pk"),
        "vector": lambda: (
            Article.objects.annotate(v=SearchVector("title", "body"))
            .filter(v="server")
            .order_by("pk")
        ),
        "stored vector": lambda: Article.objects.filter(
            vector=SearchQuery("connect", config="english")
        ).order_by("pk"),
        "rank": lambda: Article.objects.annotate(
            rank=SearchRank(F("vector"), SearchQuery("server", config="english"))
        ).order_by("-rank", "pk"),
        "websearch": lambda: Article.objects.filter(
            vector=SearchQuery(
                '"event loop" or cheese -wine', search_type="websearch", config="english"
            )
        ).order_by("pk"),
        "headline": lambda: Article.objects.annotate(
            h=SearchHeadline("body", SearchQuery("server"), start_sel="<b>", stop_sel="</b>")
        ).order_by("pk"),
        "combined": lambda: Article.objects.filter(
            vector=SearchQuery("loop", config="english") | SearchQuery("pool", config="english")
        ).order_by("pk"),
    },
)

topic(
    "aliases",
    {
        "using": lambda: books().using("other"),
        "using related": lambda: books().using("other").select_related("publisher__country"),
        "using values": lambda: books().using("other").values("pk", "created", "title"),
        "using trunc": lambda: books().using("other").annotate(day=TruncDate("created")),
        "db_manager": lambda: Book.objects.db_manager("other").filter(pk__lt=3).order_by("pk"),
    },
)

topic(
    "errors",
    {
        "lock outside a transaction": lambda: books(pk=1).select_for_update(),
        "cast": lambda: books().annotate(n=Cast("title", IntegerField())),
        "division by zero": lambda: books().annotate(n=F("pk") / (F("pages") - F("pages"))),
        "statement": lambda: Book.objects.raw("SELECT nothing FROM shop_book"),
        "raw without key": lambda: Book.objects.raw("SELECT title FROM shop_book"),
        "prefetch of no relation": lambda: books().prefetch_related("nothing"),
        "prefetch of no relation, nested": lambda: books().prefetch_related("publisher__nothing"),
        "generic prefetch without queryset for a model": lambda: Note.objects.prefetch_related(
            GenericPrefetch("target", [Book.objects.none(), Book.objects.none()])
        ),
    },
    raises=(
        "lock outside a transaction",
        "cast",
        "division by zero",
        "statement",
        "raw without key",
        "prefetch of no relation",
        "prefetch of no relation, nested",
        "generic prefetch without queryset for a model",
    ),
)
