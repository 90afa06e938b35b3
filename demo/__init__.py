"""Django's a* methods and asyncorm side by side, on a live server: `make demo`."""
