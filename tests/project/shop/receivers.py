"""Synchronous signal receivers that write what they saw to the table of audit entries."""

from typing import Any

from django.db.models import Model
from django.db.models.signals import m2m_changed, post_delete, post_save, pre_delete, pre_save

from tests.project.shop.models import AuditEntry, Basket


def audit(using: str, text: str) -> None:
    AuditEntry.objects.using(using).create(text=text)


def before_save(sender: type[Model], instance: Basket, using: str, **kwargs: Any) -> None:
    # A query inside a receiver: it must see what the sender's transaction sees.
    others = Basket.objects.using(using).exclude(pk=instance.pk).count()
    audit(using, f"pre_save {instance.name} beside {others}")


def after_save(
    sender: type[Model], instance: Basket, created: bool, using: str, **kwargs: Any
) -> None:
    fields = kwargs["update_fields"]
    audit(using, f"post_save {instance.name} {created=} {sorted(fields) if fields else None}")


def before_delete(sender: type[Model], instance: Basket, using: str, **kwargs: Any) -> None:
    audit(using, f"pre_delete {instance.name} with {instance.tags.count()} tags")


def after_delete(sender: type[Model], instance: Basket, using: str, **kwargs: Any) -> None:
    audit(using, f"post_delete {instance.name}")


def tags_changed(
    sender: type[Model], instance: Model, action: str, pk_set: set[int] | None, **kwargs: Any
) -> None:
    pks = sorted(pk_set) if pk_set is not None else None
    audit(kwargs["using"], f"{action} {instance} {pks} reverse={kwargs['reverse']}")


def connect() -> None:
    pre_save.connect(before_save, sender=Basket, dispatch_uid="shop")
    post_save.connect(after_save, sender=Basket, dispatch_uid="shop")
    pre_delete.connect(before_delete, sender=Basket, dispatch_uid="shop")
    post_delete.connect(after_delete, sender=Basket, dispatch_uid="shop")
    m2m_changed.connect(tags_changed, sender=Basket.tags.through, dispatch_uid="shop")
