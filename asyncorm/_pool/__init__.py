"""psycopg_pool's pool and its connections, as a loop of ours needs them."""
