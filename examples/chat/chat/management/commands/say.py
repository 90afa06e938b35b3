"""`python manage.py say ROOM AUTHOR TEXT`: another process that takes part in the chat."""

from asgiref.sync import async_to_sync
from django.core.management.base import BaseCommand

from chat import models


class Command(BaseCommand):
    help = "Say something in a room."

    def add_arguments(self, parser):
        for name in ("room", "author", "text"):
            parser.add_argument(name)

    def handle(self, room, author, text, **options):
        async_to_sync(models.say)(room, author, text)
