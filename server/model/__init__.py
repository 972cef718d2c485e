"""A transformers model made servable: loaded, probed, adapted and run."""
