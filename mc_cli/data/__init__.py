"""Token windows from what the user hands in: text, chat rows, bundled samples."""
