"""What a connection is made of: statements, cursors, cancelling, what stands for one."""
