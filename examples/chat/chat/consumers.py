"""One WebSocket in one room. Between two messages it holds no connection of the pool."""

from channels.generic.websocket import AsyncJsonWebsocketConsumer
from django.core.exceptions import ValidationError

from chat.models import Message, say


class Room(AsyncJsonWebsocketConsumer):
    async def connect(self):
        self.room = self.scope["url_route"]["kwargs"]["room"]
        await self.channel_layer.group_add(f"room.{self.room}", self.channel_name)
        await self.accept()
        latest = await Message.objects.filter(room=self.room).order_by("-pk")[:20].anative()
        for message in reversed(latest):
            await self.send_json(message.as_json())

    async def disconnect(self, code):
        await self.channel_layer.group_discard(f"room.{self.room}", self.channel_name)

    async def receive_json(self, content):
        try:
            await say(self.room, content.get("author", ""), content.get("text", ""))
        except ValidationError as error:
            await self.send_json({"errors": error.message_dict})

    async def said(self, event):
        """Pass on what the group was told."""
        await self.send_json(event["message"])
