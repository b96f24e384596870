"""How much a channel matters."""
