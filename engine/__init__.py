"""Tokens in, tokens out. Nothing below this package knows of OpenAI, HTTP or tiers."""
