"""The demo's page: one HTML file without scripts or network, and one picture."""
