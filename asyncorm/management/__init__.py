"""What `manage.py asyncorm` needs; Django looks for commands in this package."""
