"""Training: data, configuration, loss, trainer, generation. Import the part that you use; this file
imports nothing, so that the command line can read the configuration without loading torch."""
