"""Gives the sample shop its own label, so that it never meets a project's "shop"."""

from django.apps import AppConfig


class ShopConfig(AppConfig):
    name = "demo.shop"
    label = "demo_shop"
    default_auto_field = "django.db.models.BigAutoField"
