"""The update: low-rank adapters, their averaged weights, checksums and export."""
