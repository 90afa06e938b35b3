"""The addresses of pages; those of WebSockets are in asgi.py."""

from django.urls import path

from chat import views

urlpatterns = [
    path("", views.page),
    path("activity/", views.activity),
    path("rooms/<slug:room>/", views.page, name="room"),
]
