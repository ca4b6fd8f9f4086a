"""What tests share and what they start: no test is in here."""
