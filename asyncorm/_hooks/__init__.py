"""Where Django asks for rows or writes them: a plan of the statement cache serves it."""
