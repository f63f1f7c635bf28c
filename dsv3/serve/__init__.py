"""Serving a model over HTTP: the OpenAI API, its limits and figures, the chat page, and a load to measure it with."""
