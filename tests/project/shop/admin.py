"""The shop in the admin: synchronous code on the same database."""

from django.contrib import admin

from tests.project.shop.models import Book, Category, Publisher, Tag

admin.site.register([Book, Category, Publisher, Tag])
