"""Tools that make, check and publish hub folders of STTS models."""
