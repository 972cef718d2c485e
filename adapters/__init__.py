"""A name becomes pages on the device: formats, store, registry, loader and pool."""
