"""Files and layouts of other tools."""
