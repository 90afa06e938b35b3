"""Sessions: who uses which server connection, and until when."""
