"""The server: many adapters on one base, in one batch. Needs transformers; nothing imports it but `veneer serve`."""
