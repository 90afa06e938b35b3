"""A native consumer of Channels."""

from channels.generic.websocket import AsyncJsonWebsocketConsumer

import asyncorm
from bookshop.models import Visit


class Log(AsyncJsonWebsocketConsumer):
    """Leaves a row for each message, with time to do so; says how many there are of that token."""

    async def receive_json(self, content):
        async with asyncorm.atomic():
            await Visit.objects.acreate(token=content["token"])
            async with asyncorm.cursor() as cursor:
                await cursor.execute("SELECT pg_sleep(%s)", [content["seconds"]])
            asyncorm.set_rollback(content.get("forget", False))
        count = await Visit.objects.filter(token=content["token"]).acount()
        await self.send_json({"token": content["token"], "count": count})
