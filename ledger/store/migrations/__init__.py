"""Schema history of the journal's database."""
