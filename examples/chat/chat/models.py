"""What was said, and how something is said so that everybody hears it."""

from channels.layers import get_channel_layer
from django.db import models

import asyncorm

ACTIVITY = "chat_activity"  # the PostgreSQL channel that names each room in which something is said


class Message(models.Model):
    room = models.SlugField(max_length=40)
    author = models.CharField(max_length=40)
    text = models.TextField(max_length=2000)
    said_at = models.DateTimeField(auto_now_add=True)

    def __str__(self):
        return f"{self.author}: {self.text}"

    def as_json(self):
        return {"id": self.pk, "author": self.author, "text": self.text}


async def say(room, author, text):
    """Keep a message and tell all who are in the room, in whichever process they are.

    It is told when the block commits: nobody hears of a message that is not kept.
    """
    message = Message(room=room, author=author, text=text)
    message.clean_fields()
    async with asyncorm.atomic():
        await message.asave()
        event = {"type": "said", "message": message.as_json()}
        await get_channel_layer().group_send(f"room.{room}", event)
        await asyncorm.notify(ACTIVITY, room)
    return message
