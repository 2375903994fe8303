"""What a run would cost elsewhere, from what it did here."""
