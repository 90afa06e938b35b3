"""The page, and a stream of the rooms in which something is being said."""

from django.http import StreamingHttpResponse
from django.shortcuts import render

import asyncorm
from chat.models import ACTIVITY


async def page(request, room="lobby"):
    return render(request, "chat/page.html", {"room": room})


async def activity(request):
    """Stream names of rooms as server-sent events; all streams share one connection."""

    async def events():
        async with asyncorm.listen(ACTIVITY) as notes:
            yield ": listening\n\n"
            async for note in notes:
                if not note.gap:  # after a lost connection there is nothing to tell here
                    yield f"data: {note.payload}\n\n"

    return StreamingHttpResponse(events(), content_type="text/event-stream")
