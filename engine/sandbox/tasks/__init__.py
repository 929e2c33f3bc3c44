"""The tasks of children, one module each; see `engine.sandbox.child`."""
