"""What is matched, as functions of a network and two batches."""
