"""What a student is pulled to."""
