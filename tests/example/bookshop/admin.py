"""The admin, synchronous beside native views."""

from django.contrib import admin

from bookshop.models import Book, Publisher

admin.site.register([Book, Publisher])
