"""The URLs of the example project."""

from django.contrib import admin
from django.urls import path

from bookshop import views

urlpatterns = [
    path("admin/", admin.site.urls),
    path("books/", views.books),
    path("books/sync/", views.books_synchronously),
    path("books/<int:pk>/", views.book),
    path("books/add/", views.add_book),
    path("books/add-if-allowed/", views.add_book_if_allowed),
    path("books/stream/", views.stream),
    path("accounts/login/", views.log_in),
    path("accounts/logout/", views.log_out),
    path("accounts/", views.whoami, name="whoami"),
    path("visits/<str:token>/", views.visit),
    path("visits/<str:token>/fail/", views.visit_and_fail),
    path("files/", views.upload),
    path("pool/", views.pool),
]
