"""HTTP and the engine: a request, a sequence, a step."""
