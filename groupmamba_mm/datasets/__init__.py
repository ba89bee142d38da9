"""Data sets of the plugin, and the scenes the demo data is made of."""
