"""The server: many adapters on one base, one row of a batch each. Nothing imports it but `veneer serve`."""
