"""Create the extensions that the shop needs; all of them are in PostgreSQL's contrib."""

from django.contrib.postgres.operations import (
    HStoreExtension,
    TrigramExtension,
    UnaccentExtension,
)
from django.db import migrations


class Migration(migrations.Migration):
    initial = True
    operations = [HStoreExtension(), TrigramExtension(), UnaccentExtension()]
