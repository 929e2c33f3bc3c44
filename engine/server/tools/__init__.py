"""Tools: their definitions, the formats in which models call them, and the parsers of these formats."""
