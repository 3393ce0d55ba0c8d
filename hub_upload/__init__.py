"""Tools that make hub folders of STTS models."""
