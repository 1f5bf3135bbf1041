"""From labelled images to a memory under a budget of bytes."""
