"""`manage.py asyncorm`."""
