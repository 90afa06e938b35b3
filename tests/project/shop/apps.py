"""The shop's configuration: connects its signal receivers."""

from django.apps import AppConfig


class ShopConfig(AppConfig):
    name = "tests.project.shop"

    def ready(self) -> None:
        from tests.project.shop import receivers

        receivers.connect()
