"""What is trained beside a frozen model, where it is attached, and its files."""
