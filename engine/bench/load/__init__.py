"""Load on a running server over HTTP, from one asyncio process."""
