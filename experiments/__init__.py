"""Studies and measurements. They import jaxlm, never the reverse."""
