"""Other people's file formats: key names and layouts only."""
