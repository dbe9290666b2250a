"""Facts about a program as frozen values; nothing is changed here."""
