"""The acceptance soak "no input, file or client may end or block the server for others"; see `__main__`."""
