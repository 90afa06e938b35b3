"""Ordinary synchronous views. Nothing in them knows that they run on the event loop."""

from django.contrib import messages
from django.contrib.auth.decorators import login_required
from django.contrib.auth.mixins import LoginRequiredMixin
from django.contrib.messages.views import SuccessMessageMixin
from django.db import transaction
from django.db.models import Count, F
from django.shortcuts import get_object_or_404, redirect
from django.views.decorators.http import require_POST
from django.views.generic import CreateView, DetailView, ListView

from events.models import Booking, Event


class EventList(ListView):
    queryset = Event.objects.annotate(left=F("places") - Count("bookings")).order_by("title")


class EventPage(DetailView):
    queryset = Event.objects.prefetch_related("bookings__user")


class NewEvent(LoginRequiredMixin, SuccessMessageMixin, CreateView):
    model = Event
    fields = ["title", "places"]
    success_message = "%(title)s is announced."


@require_POST
@login_required
def book(request, pk):
    """Book a place, if one is left when it is this user's turn."""
    with transaction.atomic():
        event = get_object_or_404(Event.objects.select_for_update(), pk=pk)
        if event.bookings.filter(user=request.user).exists():
            messages.info(request, "You have a place already.")
        elif event.bookings.count() >= event.places:
            messages.error(request, "No place is left.")
        else:
            Booking.objects.create(event=event, user=request.user)
            messages.success(request, "You have a place.")
    return redirect(event)
