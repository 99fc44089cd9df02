"""The demo: fine-tune a real language model to write English pronunciations. Run it with `make
demo`."""
