"""Create the tables of the shop."""

import uuid

import django.contrib.postgres.fields
import django.contrib.postgres.fields.hstore
import django.contrib.postgres.fields.ranges
import django.contrib.postgres.indexes
import django.contrib.postgres.search
import django.db.models.deletion
import django.db.models.expressions
import django.db.models.functions.datetime
import django.db.models.functions.text
import django.utils.timezone
from django.conf import settings
from django.db import migrations, models

import tests.project.shop.models


class Migration(migrations.Migration):
    initial = True

    dependencies = [
        ("contenttypes", "0002_remove_content_type_name"),
        ("shop", "0001_extensions"),
        migrations.swappable_dependency(settings.AUTH_USER_MODEL),
    ]

    operations = [
        migrations.CreateModel(
            name="AuditEntry",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("text", models.CharField(max_length=200)),
            ],
            options={
                "ordering": ["pk"],
            },
        ),
        migrations.CreateModel(
            name="Person",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("name", models.CharField(max_length=100)),
                ("email", models.EmailField(blank=True, max_length=254, null=True)),
                ("born", models.DateField(blank=True, null=True)),
                ("friends", models.ManyToManyField(blank=True, to="shop.person")),
            ],
            options={
                "ordering": ["name", "pk"],
            },
        ),
        migrations.CreateModel(
            name="Country",
            fields=[
                ("code", models.CharField(max_length=2, primary_key=True, serialize=False)),
                ("name", models.CharField(max_length=50)),
            ],
        ),
        migrations.CreateModel(
            name="Customer",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("name", models.CharField(max_length=100)),
                ("joined", models.DateTimeField(blank=True, null=True)),
                (
                    "user",
                    models.OneToOneField(
                        blank=True,
                        null=True,
                        on_delete=django.db.models.deletion.CASCADE,
                        related_name="customer",
                        to=settings.AUTH_USER_MODEL,
                    ),
                ),
            ],
        ),
        migrations.CreateModel(
            name="Document",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("key", models.CharField(max_length=50, unique=True)),
                ("text", models.TextField(blank=True)),
                ("revision", models.PositiveIntegerField(default=0)),
                ("deleted", models.BooleanField(default=False)),
            ],
        ),
        migrations.CreateModel(
            name="Tag",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("name", models.CharField(max_length=50, unique=True)),
                ("weight", models.SmallIntegerField(default=0)),
            ],
            options={
                "ordering": ["name"],
            },
        ),
        migrations.CreateModel(
            name="Ticket",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("title", models.CharField(max_length=50)),
                ("status", models.CharField(db_default="open", max_length=10)),
                (
                    "kind",
                    models.CharField(
                        db_default=django.db.models.functions.text.Upper(models.Value("bug")),
                        max_length=10,
                    ),
                ),
                (
                    "opened",
                    models.DateTimeField(db_default=django.db.models.functions.datetime.Now()),
                ),
                (
                    "label",
                    models.GeneratedField(
                        db_persist=True,
                        expression=django.db.models.functions.text.Upper("title"),
                        output_field=models.CharField(max_length=50),
                    ),
                ),
            ],
        ),
        migrations.CreateModel(
            name="Article",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("title", models.CharField(max_length=200)),
                ("body", models.TextField()),
                ("vector", django.contrib.postgres.search.SearchVectorField(null=True)),
            ],
            options={
                "indexes": [
                    django.contrib.postgres.indexes.GinIndex(
                        fields=["vector"], name="shop_articl_vector_0a3a1f_gin"
                    )
                ],
            },
        ),
        migrations.CreateModel(
            name="Author",
            fields=[
                (
                    "person_ptr",
                    models.OneToOneField(
                        auto_created=True,
                        on_delete=django.db.models.deletion.CASCADE,
                        parent_link=True,
                        primary_key=True,
                        serialize=False,
                        to="shop.person",
                    ),
                ),
                ("pen_name", models.CharField(blank=True, max_length=100)),
                (
                    "influences",
                    models.ManyToManyField(blank=True, related_name="influenced", to="shop.author"),
                ),
                (
                    "mentor",
                    models.ForeignKey(
                        blank=True,
                        null=True,
                        on_delete=django.db.models.deletion.SET_NULL,
                        related_name="pupils",
                        to="shop.author",
                    ),
                ),
            ],
            bases=("shop.person",),
        ),
        migrations.CreateModel(
            name="Book",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("created", models.DateTimeField(default=django.utils.timezone.now)),
                ("changed", models.DateTimeField(blank=True, null=True)),
                ("title", models.CharField(max_length=200)),
                ("isbn", models.CharField(blank=True, max_length=13, null=True, unique=True)),
                ("slug", models.SlugField(blank=True, max_length=200)),
                ("website", models.URLField(blank=True)),
                (
                    "language",
                    models.CharField(
                        choices=[("de", "German"), ("en", "English"), ("fr", "French")],
                        default="en",
                        max_length=2,
                    ),
                ),
                ("price", models.DecimalField(decimal_places=2, max_digits=8)),
                ("pages", models.PositiveIntegerField(default=0)),
                ("rating", models.FloatField(blank=True, null=True)),
                ("sold", models.BigIntegerField(default=0)),
                ("published", models.DateField(blank=True, null=True)),
                ("in_print", models.BooleanField(default=True)),
                ("audio_length", models.DurationField(blank=True, null=True)),
                ("data", models.JSONField(blank=True, default=dict)),
                ("extra", models.JSONField(blank=True, null=True)),
                (
                    "keywords",
                    django.contrib.postgres.fields.ArrayField(
                        base_field=models.CharField(max_length=30),
                        blank=True,
                        default=list,
                        size=None,
                    ),
                ),
                (
                    "matrix",
                    django.contrib.postgres.fields.ArrayField(
                        base_field=django.contrib.postgres.fields.ArrayField(
                            base_field=models.IntegerField(), size=None
                        ),
                        blank=True,
                        null=True,
                        size=None,
                    ),
                ),
                ("sample", models.FileField(blank=True, upload_to="samples")),
                (
                    "gross",
                    models.GeneratedField(
                        db_persist=True,
                        expression=django.db.models.expressions.CombinedExpression(
                            models.F("price"),
                            "*",
                            models.Value(1.2, output_field=models.DecimalField()),
                        ),
                        output_field=models.DecimalField(decimal_places=4, max_digits=12),
                    ),
                ),
                ("related", models.ManyToManyField(blank=True, to="shop.book")),
            ],
            options={
                "get_latest_by": ["published", "pk"],
            },
        ),
        migrations.CreateModel(
            name="Authorship",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("role", models.CharField(default="writer", max_length=20)),
                ("position", models.PositiveSmallIntegerField(default=1)),
                (
                    "book",
                    models.ForeignKey(on_delete=django.db.models.deletion.CASCADE, to="shop.book"),
                ),
                (
                    "author",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.CASCADE, to="shop.author"
                    ),
                ),
            ],
            options={
                "ordering": ["position", "pk"],
            },
        ),
        migrations.CreateModel(
            name="PrintedBook",
            fields=[],
            options={
                "ordering": ["-pages", "pk"],
                "proxy": True,
                "indexes": [],
                "constraints": [],
            },
            bases=("shop.book",),
        ),
        migrations.CreateModel(
            name="Category",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("name", models.CharField(max_length=50)),
                (
                    "parent",
                    models.ForeignKey(
                        blank=True,
                        null=True,
                        on_delete=django.db.models.deletion.CASCADE,
                        related_name="children",
                        to="shop.category",
                    ),
                ),
            ],
        ),
        migrations.CreateModel(
            name="Event",
            fields=[
                ("id", models.UUIDField(default=uuid.uuid4, primary_key=True, serialize=False)),
                ("name", models.CharField(max_length=100)),
                (
                    "slot",
                    django.contrib.postgres.fields.ranges.DateTimeRangeField(blank=True, null=True),
                ),
                (
                    "days",
                    django.contrib.postgres.fields.ranges.DateRangeField(blank=True, null=True),
                ),
                (
                    "seats",
                    django.contrib.postgres.fields.ranges.IntegerRangeField(blank=True, null=True),
                ),
                (
                    "fee",
                    django.contrib.postgres.fields.ranges.DecimalRangeField(blank=True, null=True),
                ),
                ("doors", models.TimeField(blank=True, null=True)),
                ("lasts", models.DurationField(blank=True, null=True)),
                ("address", models.GenericIPAddressField(blank=True, null=True)),
                ("poster", models.BinaryField(blank=True, null=True)),
                (
                    "attributes",
                    django.contrib.postgres.fields.hstore.HStoreField(blank=True, null=True),
                ),
                (
                    "host",
                    models.ForeignKey(
                        blank=True,
                        null=True,
                        on_delete=django.db.models.deletion.CASCADE,
                        related_name="events",
                        to="shop.person",
                    ),
                ),
            ],
        ),
        migrations.CreateModel(
            name="Order",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("placed", models.DateTimeField()),
                (
                    "status",
                    models.IntegerField(choices=[(1, "Open"), (2, "Paid"), (3, "Sent")], default=1),
                ),
                ("remark", models.TextField(blank=True, null=True)),
                (
                    "customer",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.CASCADE,
                        related_name="orders",
                        to="shop.customer",
                    ),
                ),
            ],
            options={
                "ordering": ["placed", "pk"],
                "get_latest_by": "placed",
            },
        ),
        migrations.CreateModel(
            name="Product",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("sku", models.UUIDField(default=uuid.uuid4, unique=True)),
                ("name", models.CharField(max_length=100)),
                ("price", models.DecimalField(decimal_places=2, max_digits=8)),
                ("stock", models.IntegerField(default=0)),
                (
                    "value",
                    models.GeneratedField(
                        db_persist=True,
                        expression=django.db.models.expressions.CombinedExpression(
                            models.F("price"), "*", models.F("stock")
                        ),
                        output_field=models.DecimalField(decimal_places=2, max_digits=14),
                    ),
                ),
                (
                    "book",
                    models.OneToOneField(
                        blank=True,
                        null=True,
                        on_delete=django.db.models.deletion.SET_NULL,
                        related_name="product",
                        to="shop.book",
                    ),
                ),
                (
                    "category",
                    models.ForeignKey(
                        on_delete=models.SET(tests.project.shop.models.misc_category),
                        related_name="products",
                        to="shop.category",
                    ),
                ),
            ],
        ),
        migrations.CreateModel(
            name="OrderLine",
            fields=[
                (
                    "pk",
                    models.CompositePrimaryKey(
                        "order_id",
                        "number",
                        blank=True,
                        editable=False,
                        primary_key=True,
                        serialize=False,
                    ),
                ),
                ("number", models.PositiveSmallIntegerField()),
                ("quantity", models.PositiveIntegerField(default=1)),
                ("price", models.DecimalField(decimal_places=2, max_digits=8)),
                (
                    "order",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.CASCADE,
                        related_name="lines",
                        to="shop.order",
                    ),
                ),
                (
                    "product",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.PROTECT,
                        related_name="lines",
                        to="shop.product",
                    ),
                ),
            ],
        ),
        migrations.AddField(
            model_name="customer",
            name="favourites",
            field=models.ManyToManyField(blank=True, related_name="fans", to="shop.product"),
        ),
        migrations.CreateModel(
            name="Publisher",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("name", models.CharField(max_length=100, unique=True)),
                ("founded", models.DateField(blank=True, null=True)),
                (
                    "country",
                    models.ForeignKey(
                        blank=True,
                        null=True,
                        on_delete=django.db.models.deletion.SET_NULL,
                        related_name="publishers",
                        to="shop.country",
                    ),
                ),
            ],
            options={
                "get_latest_by": "founded",
            },
        ),
        migrations.AddField(
            model_name="book",
            name="publisher",
            field=models.ForeignKey(
                blank=True,
                null=True,
                on_delete=django.db.models.deletion.CASCADE,
                related_name="books",
                to="shop.publisher",
            ),
        ),
        migrations.CreateModel(
            name="Review",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("stars", models.PositiveSmallIntegerField()),
                ("body", models.TextField(blank=True)),
                ("written", models.DateTimeField()),
                (
                    "book",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.CASCADE,
                        related_name="reviews",
                        to="shop.book",
                    ),
                ),
                (
                    "customer",
                    models.ForeignKey(
                        blank=True,
                        null=True,
                        on_delete=django.db.models.deletion.SET_NULL,
                        related_name="reviews",
                        to="shop.customer",
                    ),
                ),
            ],
        ),
        migrations.AddField(
            model_name="book",
            name="tags",
            field=models.ManyToManyField(blank=True, related_name="books", to="shop.tag"),
        ),
        migrations.CreateModel(
            name="Basket",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("name", models.CharField(max_length=50)),
                ("tags", models.ManyToManyField(blank=True, to="shop.tag")),
            ],
        ),
        migrations.CreateModel(
            name="StarAuthor",
            fields=[
                (
                    "author_ptr",
                    models.OneToOneField(
                        auto_created=True,
                        on_delete=django.db.models.deletion.CASCADE,
                        parent_link=True,
                        primary_key=True,
                        serialize=False,
                        to="shop.author",
                    ),
                ),
                ("stars", models.PositiveSmallIntegerField(default=1)),
            ],
            bases=("shop.author",),
        ),
        migrations.AddField(
            model_name="book",
            name="authors",
            field=models.ManyToManyField(
                related_name="books", through="shop.Authorship", to="shop.author"
            ),
        ),
        migrations.CreateModel(
            name="Profile",
            fields=[
                (
                    "customer",
                    models.OneToOneField(
                        on_delete=django.db.models.deletion.CASCADE,
                        primary_key=True,
                        serialize=False,
                        to="shop.customer",
                    ),
                ),
                ("bio", models.TextField(blank=True)),
                (
                    "country",
                    models.ForeignKey(
                        blank=True,
                        null=True,
                        on_delete=django.db.models.deletion.PROTECT,
                        to="shop.country",
                    ),
                ),
            ],
        ),
        migrations.CreateModel(
            name="Note",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("object_id", models.PositiveBigIntegerField()),
                ("text", models.CharField(max_length=200)),
                (
                    "content_type",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.CASCADE, to="contenttypes.contenttype"
                    ),
                ),
            ],
            options={
                "indexes": [
                    models.Index(
                        fields=["content_type", "object_id"], name="shop_note_content_8e9e2d_idx"
                    )
                ],
            },
        ),
        migrations.AddConstraint(
            model_name="product",
            constraint=models.CheckConstraint(
                condition=models.Q(("stock__gte", 0)), name="stock_exists"
            ),
        ),
        migrations.AlterOrderWithRespectTo(
            name="review",
            order_with_respect_to="book",
        ),
        migrations.AddConstraint(
            model_name="review",
            constraint=models.UniqueConstraint(fields=("book", "customer"), name="one_review"),
        ),
        migrations.AddConstraint(
            model_name="book",
            constraint=models.CheckConstraint(
                condition=models.Q(("price__gte", 0)), name="book_price_not_negative"
            ),
        ),
        migrations.AddConstraint(
            model_name="authorship",
            constraint=models.UniqueConstraint(fields=("book", "author"), name="one_authorship"),
        ),
    ]
