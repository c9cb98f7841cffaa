"""The commands, and the processes that they are made of. Whatever is here nobody below imports."""
