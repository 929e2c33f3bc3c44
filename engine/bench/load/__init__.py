"""Load on a running server over HTTP, from one asyncio process: what was asked, when, and what came when."""
