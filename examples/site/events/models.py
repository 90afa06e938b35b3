"""Events with a number of places, and who has one."""

from django.conf import settings
from django.db import models
from django.urls import reverse


class Event(models.Model):
    title = models.CharField(max_length=100, unique=True)
    places = models.PositiveSmallIntegerField()

    def __str__(self):
        return self.title

    def get_absolute_url(self):
        return reverse("event", args=[self.pk])


class Booking(models.Model):
    event = models.ForeignKey(Event, on_delete=models.CASCADE, related_name="bookings")
    user = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["event", "user"], name="one_place_each")]

    def __str__(self):
        return f"{self.user}: {self.event}"
