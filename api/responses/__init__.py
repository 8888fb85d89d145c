"""OpenAI's Responses API, stateless, on top of chat completions."""
