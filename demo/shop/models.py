"""Models of the sample shop: products, customers, orders with their lines, reviews."""

# Without its Django plugin, mypy cannot know what a field's attribute holds.
# mypy: disable-error-code="var-annotated, no-any-return"

from django.db import models


class Category(models.Model):
    name = models.CharField(max_length=40, unique=True)

    class Meta:
        verbose_name_plural = "categories"

    def __str__(self) -> str:
        return self.name


class Product(models.Model):
    category = models.ForeignKey(Category, models.CASCADE, related_name="products")
    name = models.CharField(max_length=80)
    price = models.DecimalField(max_digits=8, decimal_places=2)
    stock = models.IntegerField()
    added_on = models.DateField()

    def __str__(self) -> str:
        return self.name


class Customer(models.Model):
    name = models.CharField(max_length=80)
    email = models.EmailField(unique=True)
    country = models.CharField(max_length=40)
    joined_on = models.DateField()

    def __str__(self) -> str:
        return self.name


class Order(models.Model):
    customer = models.ForeignKey(Customer, models.CASCADE, related_name="orders")
    status = models.CharField(max_length=10)
    placed_at = models.DateTimeField(db_index=True)

    def __str__(self) -> str:
        return f"Order {self.pk}"


class OrderLine(models.Model):
    order = models.ForeignKey(Order, models.CASCADE, related_name="lines")
    product = models.ForeignKey(Product, models.CASCADE, related_name="lines")
    quantity = models.IntegerField()
    unit_price = models.DecimalField(max_digits=8, decimal_places=2)


class Review(models.Model):
    product = models.ForeignKey(Product, models.CASCADE, related_name="reviews")
    customer = models.ForeignKey(Customer, models.CASCADE, related_name="reviews")
    stars = models.IntegerField()
    text = models.TextField()
    written_at = models.DateTimeField()

    def __str__(self) -> str:
        return f"{self.stars} stars"
