"""Official scores of single data sets, by the rules of their own programs (docs/protocols.md)."""
