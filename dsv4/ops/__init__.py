"""The rooms: one folder per family of operations, each with a public door and a reference."""
