"""The API's addresses."""

from django.urls import path
from rest_framework.routers import SimpleRouter

from library import views

router = SimpleRouter()
router.register("authors", views.AuthorViewSet)
router.register("books", views.BookViewSet)
urlpatterns = [*router.urls, path("summary/", views.summary)]
