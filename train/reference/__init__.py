"""The reference of all settings: from the models that validate them to a page, and from that page
to a terminal."""
