"""URLs of the tests' example project: the admin, and the async views over the shop."""

from django.contrib import admin
from django.urls import path

from tests.project.shop import views

urlpatterns = [
    path("admin/", admin.site.urls),
    path("books/", views.books),
    path("books/<int:pk>/", views.book),
    path("processes/", views.processes),
]
