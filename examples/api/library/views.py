"""Django REST framework's own viewsets, native as settings.NATIVE_VIEWS names them, and a view."""

from django.db import transaction
from django.http import JsonResponse
from django.shortcuts import get_object_or_404
from rest_framework import serializers
from rest_framework.decorators import action
from rest_framework.exceptions import APIException
from rest_framework.response import Response
from rest_framework.viewsets import ModelViewSet

import asyncorm
from library.models import Author, Book, Loan


class AuthorSerializer(serializers.ModelSerializer):
    class Meta:
        model = Author
        fields = ["id", "name"]


class BookSerializer(serializers.ModelSerializer):
    author_name = serializers.CharField(source="author.name", read_only=True)

    class Meta:
        model = Book
        fields = ["id", "title", "author", "author_name", "copies"]


class LoanSerializer(serializers.ModelSerializer):
    class Meta:
        model = Loan
        fields = ["id", "book", "reader", "lent_at"]


class NoCopyLeft(APIException):
    status_code = 409
    default_detail = "All copies of this book are lent."


class AuthorViewSet(ModelViewSet):
    queryset = Author.objects.order_by("name")
    serializer_class = AuthorSerializer


class BookViewSet(ModelViewSet):
    queryset = Book.objects.select_related("author").order_by("title")
    serializer_class = BookSerializer

    @action(detail=True, methods=["post"])
    def lend(self, request, pk):
        """Lend a copy to who asks; of those who ask at once, to as many as there are copies."""
        with transaction.atomic():
            book = get_object_or_404(Book.objects.select_for_update(), pk=pk)
            if not book.copies:
                raise NoCopyLeft
            book.copies -= 1
            book.save(update_fields=["copies"])
            loan = Loan.objects.create(book=book, reader=request.user.get_username())
        return Response(LoanSerializer(loan).data, status=201)


async def summary(request):
    """Count everything: three statements, one connection, one round trip."""
    authors, books, loans = await asyncorm.batch(
        Author.objects.count, Book.objects.count, Loan.objects.count
    )
    return JsonResponse({"authors": authors, "books": books, "loans": loans})
