"""For people: sessions, chat, page, command line."""
