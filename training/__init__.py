"""Make policies and judge them."""
