"""POST /v1/responses: text and function tools, without state."""
