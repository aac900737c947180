"""Credit accounting: signed journals, receipts, balances. Knows no GPU and no network."""
