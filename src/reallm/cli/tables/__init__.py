"""Tables of results as plain text and Markdown."""
