"""The packages of recipes are installed before their own tests run, by the tests here."""

collect_ignore = ["backend"]
