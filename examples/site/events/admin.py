"""Events in the admin, their bookings with them."""

from django.contrib import admin

from events.models import Booking, Event


class BookingInline(admin.TabularInline):
    model = Booking
    extra = 1


@admin.register(Event)
class EventAdmin(admin.ModelAdmin):
    list_display = ["title", "places"]
    search_fields = ["title"]
    inlines = [BookingInline]
