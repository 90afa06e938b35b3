"""The site's addresses."""

from django.contrib import admin
from django.contrib.auth.views import LoginView, LogoutView
from django.contrib.staticfiles.urls import staticfiles_urlpatterns
from django.urls import path

from events import views

urlpatterns = [
    path("", views.EventList.as_view(), name="events"),
    path("new/", views.NewEvent.as_view(), name="new"),
    path("<int:pk>/", views.EventPage.as_view(), name="event"),
    path("<int:pk>/book/", views.book, name="book"),
    path("login/", LoginView.as_view(), name="login"),
    path("logout/", LogoutView.as_view(), name="logout"),
    path("admin/", admin.site.urls),
    *staticfiles_urlpatterns(),  # with DEBUG
]
