"""The bundled demo: a small Llama base, four LoRA adapters, and the script that makes them."""
