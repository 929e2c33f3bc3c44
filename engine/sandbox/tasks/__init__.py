"""What children do. Each module is one task; see `engine.sandbox.child`."""
