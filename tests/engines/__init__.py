"""Packed models in engines of their own environments: `make test-engines`; `make test` leaves this folder out."""
