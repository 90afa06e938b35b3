"""The URLs of the example project."""

from django.contrib import admin
from django.urls import path

from bookshop import views

urlpatterns = [
    path("admin/", admin.site.urls),
    path("books/", views.books),
    path("books/add/", views.add_book),
]
