"""AGC inside other frameworks' training loops: one file each, which imports its framework only when it is used."""
