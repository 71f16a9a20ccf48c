"""One run as one page: figures, curves, fates and real rows in a single HTML file that needs nothing besides itself."""
