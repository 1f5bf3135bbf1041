"""What is stored: memories, number formats and the file."""
