"""The bookshop's models: one of nearly everything that Django's ORM can express on PostgreSQL."""

import uuid
from typing import Any, ClassVar, Self

from django.conf import settings
from django.contrib.contenttypes.fields import GenericForeignKey, GenericRelation
from django.contrib.contenttypes.models import ContentType
from django.contrib.postgres.fields import (
    ArrayField,
    DateRangeField,
    DateTimeRangeField,
    DecimalRangeField,
    HStoreField,
    IntegerRangeField,
)
from django.contrib.postgres.indexes import GinIndex
from django.contrib.postgres.search import SearchVectorField
from django.db import models
from django.db.models import F, Q, Value
from django.db.models.functions import Now, Upper
from django.utils import timezone


class StampedQuerySet(models.QuerySet):
    def recent(self) -> Self:
        return self.filter(created__year__gte=2024)

    def newest(self) -> Any:
        return self.order_by("-created", "pk").first()


class StampedManager(models.Manager.from_queryset(StampedQuerySet)):  # type: ignore[misc]
    """A manager with a method of its own beside those of its queryset."""

    def stamped_between(self, start: Any, end: Any) -> Any:
        return self.get_queryset().filter(created__range=(start, end))


class Stamped(models.Model):
    created = models.DateTimeField(default=timezone.now)
    changed = models.DateTimeField(null=True, blank=True)

    objects: ClassVar[Any] = StampedManager()

    class Meta:
        abstract = True


class Country(models.Model):
    code = models.CharField(max_length=2, primary_key=True)
    name = models.CharField(max_length=50)

    def __str__(self) -> str:
        return self.name


class Note(models.Model):
    """A remark on any object."""

    content_type = models.ForeignKey(ContentType, on_delete=models.CASCADE)
    object_id = models.PositiveBigIntegerField()
    target = GenericForeignKey("content_type", "object_id")
    text = models.CharField(max_length=200)

    class Meta:
        indexes = [models.Index(fields=["content_type", "object_id"])]

    def __str__(self) -> str:
        return self.text


class Publisher(models.Model):
    name = models.CharField(max_length=100, unique=True)
    country = models.ForeignKey(
        Country, on_delete=models.SET_NULL, null=True, blank=True, related_name="publishers"
    )
    founded = models.DateField(null=True, blank=True)
    notes = GenericRelation(Note, related_query_name="publisher")

    class Meta:
        get_latest_by = "founded"

    def __str__(self) -> str:
        return self.name


class Person(models.Model):
    name = models.CharField(max_length=100)
    email = models.EmailField(null=True, blank=True)
    born = models.DateField(null=True, blank=True)
    friends = models.ManyToManyField("self", blank=True)

    class Meta:
        ordering = ["name", "pk"]

    def __str__(self) -> str:
        return self.name


class Author(Person):
    """Multi-table inheritance, a tree and an asymmetrical relation to itself."""

    pen_name = models.CharField(max_length=100, blank=True)
    mentor = models.ForeignKey(
        "self", on_delete=models.SET_NULL, null=True, blank=True, related_name="pupils"
    )
    influences = models.ManyToManyField(
        "self", symmetrical=False, blank=True, related_name="influenced"
    )
    notes = GenericRelation(Note, related_query_name="author")


class StarAuthor(Author):
    """The second level of multi-table inheritance."""

    stars = models.PositiveSmallIntegerField(default=1)


class Tag(models.Model):
    name = models.CharField(max_length=50, unique=True)
    weight = models.SmallIntegerField(default=0)

    class Meta:
        ordering = ["name"]

    def __str__(self) -> str:
        return self.name


class Book(Stamped):
    class Language(models.TextChoices):
        GERMAN = "de", "German"
        ENGLISH = "en", "English"
        FRENCH = "fr", "French"

    title = models.CharField(max_length=200)
    isbn = models.CharField(max_length=13, unique=True, null=True, blank=True)
    slug = models.SlugField(max_length=200, blank=True)
    website = models.URLField(blank=True)
    language = models.CharField(max_length=2, choices=Language, default=Language.ENGLISH)
    publisher = models.ForeignKey(
        Publisher, on_delete=models.CASCADE, null=True, blank=True, related_name="books"
    )
    authors = models.ManyToManyField(Author, through="Authorship", related_name="books")
    tags = models.ManyToManyField(Tag, blank=True, related_name="books")
    related = models.ManyToManyField("self", blank=True)
    price = models.DecimalField(max_digits=8, decimal_places=2)
    pages = models.PositiveIntegerField(default=0)
    rating = models.FloatField(null=True, blank=True)
    sold = models.BigIntegerField(default=0)
    published = models.DateField(null=True, blank=True)
    in_print = models.BooleanField(default=True)
    audio_length = models.DurationField(null=True, blank=True)
    data = models.JSONField(default=dict, blank=True)
    extra = models.JSONField(null=True, blank=True)
    keywords = ArrayField(models.CharField(max_length=30), default=list, blank=True)
    matrix = ArrayField(ArrayField(models.IntegerField()), null=True, blank=True)
    sample = models.FileField(upload_to="samples", blank=True)
    gross = models.GeneratedField(
        expression=F("price") * Value(1.2, output_field=models.DecimalField()),
        output_field=models.DecimalField(max_digits=12, decimal_places=4),
        db_persist=True,
    )
    notes = GenericRelation(Note, related_query_name="book")

    class Meta:
        get_latest_by = ["published", "pk"]
        constraints = [
            models.CheckConstraint(condition=Q(price__gte=0), name="book_price_not_negative"),
        ]

    def __str__(self) -> str:
        return self.title


class PrintedManager(models.Manager):
    def get_queryset(self) -> models.QuerySet:
        return super().get_queryset().filter(in_print=True)


class PrintedBook(Book):
    """A proxy whose default manager sees a part of the table."""

    objects: ClassVar[Any] = PrintedManager()
    everything: ClassVar[Any] = models.Manager()

    class Meta:
        proxy = True
        ordering = ["-pages", "pk"]


class Authorship(models.Model):
    book = models.ForeignKey(Book, on_delete=models.CASCADE)
    author = models.ForeignKey(Author, on_delete=models.CASCADE)
    role = models.CharField(max_length=20, default="writer")
    position = models.PositiveSmallIntegerField(default=1)

    class Meta:
        ordering = ["position", "pk"]
        constraints = [models.UniqueConstraint(fields=["book", "author"], name="one_authorship")]


class Category(models.Model):
    name = models.CharField(max_length=50)
    parent = models.ForeignKey(
        "self", on_delete=models.CASCADE, null=True, blank=True, related_name="children"
    )

    def __str__(self) -> str:
        return self.name


def misc_category() -> Category:
    return Category.objects.get_or_create(name="misc", parent=None)[0]


class Product(models.Model):
    sku = models.UUIDField(default=uuid.uuid4, unique=True)
    name = models.CharField(max_length=100)
    category = models.ForeignKey(
        Category, on_delete=models.SET(misc_category), related_name="products"
    )
    book = models.OneToOneField(
        Book, on_delete=models.SET_NULL, null=True, blank=True, related_name="product"
    )
    price = models.DecimalField(max_digits=8, decimal_places=2)
    stock = models.IntegerField(default=0)
    value = models.GeneratedField(
        expression=F("price") * F("stock"),
        output_field=models.DecimalField(max_digits=14, decimal_places=2),
        db_persist=True,
    )

    class Meta:
        constraints = [models.CheckConstraint(condition=Q(stock__gte=0), name="stock_exists")]

    def __str__(self) -> str:
        return self.name


class Customer(models.Model):
    name = models.CharField(max_length=100)
    user = models.OneToOneField(
        settings.AUTH_USER_MODEL,
        on_delete=models.CASCADE,
        null=True,
        blank=True,
        related_name="customer",
    )
    joined = models.DateTimeField(null=True, blank=True)
    favourites = models.ManyToManyField(Product, blank=True, related_name="fans")

    def __str__(self) -> str:
        return self.name


class Profile(models.Model):
    """One to one, its foreign key being its primary key; some customers have none."""

    customer = models.OneToOneField(Customer, on_delete=models.CASCADE, primary_key=True)
    bio = models.TextField(blank=True)
    country = models.ForeignKey(Country, on_delete=models.PROTECT, null=True, blank=True)


class Order(models.Model):
    class Status(models.IntegerChoices):
        OPEN = 1
        PAID = 2
        SENT = 3

    customer = models.ForeignKey(Customer, on_delete=models.CASCADE, related_name="orders")
    placed = models.DateTimeField()
    status = models.IntegerField(choices=Status, default=Status.OPEN)
    remark = models.TextField(null=True, blank=True)

    class Meta:
        ordering = ["placed", "pk"]
        get_latest_by = "placed"


class OrderLine(models.Model):
    pk = models.CompositePrimaryKey("order_id", "number")
    order = models.ForeignKey(Order, on_delete=models.CASCADE, related_name="lines")
    number = models.PositiveSmallIntegerField()
    product = models.ForeignKey(Product, on_delete=models.PROTECT, related_name="lines")
    quantity = models.PositiveIntegerField(default=1)
    price = models.DecimalField(max_digits=8, decimal_places=2)


class Review(models.Model):
    book = models.ForeignKey(Book, on_delete=models.CASCADE, related_name="reviews")
    customer = models.ForeignKey(
        Customer, on_delete=models.SET_NULL, null=True, blank=True, related_name="reviews"
    )
    stars = models.PositiveSmallIntegerField()
    body = models.TextField(blank=True)
    written = models.DateTimeField()

    class Meta:
        order_with_respect_to = "book"
        constraints = [models.UniqueConstraint(fields=["book", "customer"], name="one_review")]


class Event(models.Model):
    """A UUID as primary key and the rarer column types."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4)
    name = models.CharField(max_length=100)
    slot = DateTimeRangeField(null=True, blank=True)
    days = DateRangeField(null=True, blank=True)
    seats = IntegerRangeField(null=True, blank=True)
    fee = DecimalRangeField(null=True, blank=True)
    doors = models.TimeField(null=True, blank=True)
    lasts = models.DurationField(null=True, blank=True)
    address = models.GenericIPAddressField(null=True, blank=True)
    poster = models.BinaryField(null=True, blank=True)
    attributes = HStoreField(null=True, blank=True)
    host = models.ForeignKey(
        Person, on_delete=models.CASCADE, null=True, blank=True, related_name="events"
    )

    def __str__(self) -> str:
        return self.name


class Article(models.Model):
    """Full-text search, over the plain columns and over a stored vector."""

    title = models.CharField(max_length=200)
    body = models.TextField()
    vector = SearchVectorField(null=True)

    class Meta:
        indexes = [GinIndex(fields=["vector"])]

    def __str__(self) -> str:
        return self.title


class AuditEntry(models.Model):
    """What overridden methods and signal receivers wrote, in order."""

    text = models.CharField(max_length=200)

    class Meta:
        ordering = ["pk"]

    def __str__(self) -> str:
        return self.text


class DocumentQuerySet(models.QuerySet):
    """Overrides get(): a key given in another case is found, too, and misses are audited."""

    def get(self, *args: Any, **kwargs: Any) -> Any:
        if "key" in kwargs:
            kwargs["key"] = kwargs["key"].lower()
        try:
            return super().get(*args, **kwargs)
        except self.model.DoesNotExist:
            AuditEntry.objects.using(self.db).create(text=f"missed {kwargs}")
            raise

    def alive(self) -> Self:
        return self.filter(deleted=False)


class Document(models.Model):
    """Overrides save() and delete(): counts its revisions and is never really deleted."""

    key = models.CharField(max_length=50, unique=True)
    text = models.TextField(blank=True)
    revision = models.PositiveIntegerField(default=0)
    deleted = models.BooleanField(default=False)

    objects: ClassVar[Any] = DocumentQuerySet.as_manager()

    def __str__(self) -> str:
        return self.key

    def save(self, *args: Any, **kwargs: Any) -> None:
        self.revision += 1
        super().save(*args, **kwargs)
        AuditEntry.objects.using(self._state.db).create(text=f"saved {self.key} {self.revision}")

    def delete(self, *args: Any, **kwargs: Any) -> tuple[int, dict[str, int]]:
        self.deleted = True
        self.save(update_fields=["deleted", "revision"], using=kwargs.get("using"))
        return 1, {"shop.Document": 1}


class Basket(models.Model):
    """A model with signal receivers (see receivers.py)."""

    name = models.CharField(max_length=50)
    tags = models.ManyToManyField(Tag, blank=True)

    def __str__(self) -> str:
        return self.name


class Ticket(models.Model):
    """Columns whose values the database makes up."""

    title = models.CharField(max_length=50)
    status = models.CharField(max_length=10, db_default="open")
    kind = models.CharField(max_length=10, db_default=Upper(Value("bug")))
    opened = models.DateTimeField(db_default=Now())
    label = models.GeneratedField(
        expression=Upper("title"), output_field=models.CharField(max_length=50), db_persist=True
    )

    def __str__(self) -> str:
        return self.title
